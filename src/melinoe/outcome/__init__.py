"""
What fine-tuning bought and what it cost: the base, the fine-tuned model and its control, which is
the same run without the locality terms, measured alike.

All answer the same held-out prompts and read the same held-out texts, so that every change is
paired. The result goes into the checkpoint's ``melinoe.json``, from which its card is written.

    model.py    one model: perplexity of texts, routing while it writes and while it reads
    change.py   one against another, paired
    control.py  whether a run is the control of another; an adapter as a checkpoint for a while
    record.py   all, into ``melinoe.json``
"""

from melinoe.outcome.control import check_control, why_no_control
from melinoe.outcome.record import measure_outcome, record_origin, record_outcome

__all__ = [
    "check_control",
    "measure_outcome",
    "record_origin",
    "record_outcome",
    "why_no_control",
]
