"""The architecture: read layers, vision, text, model, in this order."""
