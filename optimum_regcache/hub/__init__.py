"""Checkpoints: the transformers quantization method, the structure it rebuilds, opening by name."""
