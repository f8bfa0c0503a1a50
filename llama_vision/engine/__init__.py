"""What runs the model: prefill, decoding, sampling, and the engine that ties them together."""
