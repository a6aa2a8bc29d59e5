"""From a base language model to an aligned one, each token computed once."""

__version__ = "0.1.0"
