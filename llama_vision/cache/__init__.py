"""Keys and values: the static store (kv), what it holds of images (visual_tokens), and pruning."""
