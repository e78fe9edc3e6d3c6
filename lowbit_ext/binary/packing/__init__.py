"""Packed networks: a trained model made into one that runs on bits (pack), and how it runs (packed_model)."""
