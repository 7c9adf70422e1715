"""
Fine-tune a mixture-of-experts model so that it needs few experts at a time, and say what it cost.

    order.py       which example is seen when; decided by the seed alone
    adapters.py    what is trained: routers in full, low-rank updates of the experts; merging
    objective.py   next-token loss plus the weighted locality terms
    packing.py     several examples in one row, for models that keep them apart
    forward.py     one batch through the model, and what each term says of it
    held_out.py    means of the terms over held-out examples
    trainer.py     transformers' Trainer with that objective
    run.py         finetune(): checkpoint and examples in, checkpoint and log out
"""

from melinoe.finetune.held_out import held_out_terms
from melinoe.finetune.run import FinetuneResult, finetune, train

__all__ = ["FinetuneResult", "finetune", "held_out_terms", "train"]
