"""
Measure what fine-tuning changed: base, fine-tuned model and control, the same run without terms.

All answer the same held-out prompts and read the same held-out texts, so that every change is
paired. The result goes into the checkpoint's ``melinoe.json``, from which its card is written.

    model.py    one model: perplexity of texts, routing while it writes and reads; two, paired
    control.py  whether a run is the control of another; an adapter as a checkpoint for a while
    record.py   all, into ``melinoe.json``
    pruning.py  which experts a model can do without, and what that costs
"""

from melinoe.outcome.control import check_control, why_no_control
from melinoe.outcome.pruning import Pruned, prune_by_use
from melinoe.outcome.record import record_origin, record_outcome

__all__ = [
    "Pruned",
    "check_control",
    "prune_by_use",
    "record_origin",
    "record_outcome",
    "why_no_control",
]
