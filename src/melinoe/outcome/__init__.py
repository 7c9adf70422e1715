"""
Measure what fine-tuning changed: base, fine-tuned model and control, the same run without terms.

All answer the same held-out prompts and read the same held-out texts, so that every change is
paired. The result goes into the checkpoint's ``melinoe.json``, from which its card is written.
"""

from melinoe.outcome.control import check_control, why_no_control
from melinoe.outcome.pruning import Pruned, prune_by_use
from melinoe.outcome.record import record_origin, record_outcome
