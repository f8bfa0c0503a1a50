"""llama-vision."""
