"""
Fine-tune a mixture-of-experts model so that it needs few experts at a time, and say what it cost.

    order.py       which example is seen when; decided by the seed alone
    adapters.py    what is trained: routers in full, low-rank updates of the experts; merging
    objective.py   next-token loss plus the weighted locality terms
    trainer.py     transformers' Trainer with that objective
    run.py         finetune(): checkpoint and examples in, checkpoint and log out
"""

from melinoe.finetune.run import FinetuneResult, finetune, held_out_terms, train

__all__ = ["FinetuneResult", "finetune", "held_out_terms", "train"]
