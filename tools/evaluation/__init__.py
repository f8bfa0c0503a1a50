"""Benchmarks with fewer visual tokens: what `tools/evaluate.py` runs."""
