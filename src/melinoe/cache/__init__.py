"""Decide which experts are resident in fast memory, and count; no tensors and no copies."""

# On a miss: wait for the expert, compute it on the CPU, or whichever is faster.
MISSES = ("wait", "cpu", "split")
# It loads less than lru on gpt-oss-20b, and in 8 of 12 cases of the shipped model; in 3 it loads up
# to .1 % more, with slots for one token alone.
# Tables: docs/findings.md#which-policy-and-how-far-from-belady and "Real routing".
DEFAULT_POLICY = "lfu"
