"""Official files into modules: where they are, what they say, and a proof that all is used."""
