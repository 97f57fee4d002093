"""The rooms that know transformers and accelerate."""
