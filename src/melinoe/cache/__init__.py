"""Decide which experts are resident in fast memory, and count; no tensors and no copies."""

# On a miss: wait for the expert, compute it on the CPU, or whichever is faster.
MISSES = ("wait", "cpu", "split")
