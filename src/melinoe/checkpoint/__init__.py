"""The hub's checkpoint layout: opened and checked without its weights, read piece by piece."""
