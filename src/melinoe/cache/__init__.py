"""Decide which experts are resident in fast memory, and count; no tensors and no copies."""

from typing import Literal, get_args

# When experts known before the prompt are loaded: a prompt that uses more experts than there are
# slots would evict them again, so after it unless told otherwise.
PrefetchAt = Literal["prompt", "completion"]
PREFETCH_MOMENTS: tuple[str, ...] = get_args(PrefetchAt)
PREFETCH_AT: PrefetchAt = "completion"

# On a miss: wait for the expert, compute it on the CPU, or whichever is faster.
MISSES = ("wait", "cpu", "split")
