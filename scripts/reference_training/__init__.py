"""Training of the reference encoders that come with the package; see ``scripts/train_reference.py``."""
