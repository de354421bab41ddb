"""Quantized replacements of float modules, and their installation."""
