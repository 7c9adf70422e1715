"""Carry out what `melinoe.cache` decided: stores, slots, transfers, and attaching to a model."""
