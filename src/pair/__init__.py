"""PAIR: image retrieval that stays honest under adversarial patches."""

__version__ = "0.1.0"
