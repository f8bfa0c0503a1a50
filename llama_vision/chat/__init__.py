"""Conversations with a checkpoint, kept and saved."""
