"""A DeepSpeed-shaped front for small ML-systems packages."""
