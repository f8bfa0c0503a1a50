"""What `tools/fuzz.py` is made of: kinds of bad input, what judges each, and what runs them."""
