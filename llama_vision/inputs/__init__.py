"""What goes in: pictures become tiles, text becomes token ids, conversations become prompts."""
