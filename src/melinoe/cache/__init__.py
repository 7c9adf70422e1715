"""Decide which experts are resident in fast memory, and count; no tensors and no copies."""
