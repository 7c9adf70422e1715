"""
What fine-tuning bought and what it cost: the base and the fine-tuned model, measured alike.

Both answer the same held-out prompts and read the same held-out texts, so that every change is
paired. The result goes into the checkpoint's ``melinoe.json``, from which its card is written.

    model.py    one model: perplexity of texts, routing while it writes and while it reads
    change.py   after against before, paired
    record.py   both, into ``melinoe.json``
"""

from melinoe.outcome.record import measure_outcome, record_origin, record_outcome

__all__ = ["measure_outcome", "record_origin", "record_outcome"]
