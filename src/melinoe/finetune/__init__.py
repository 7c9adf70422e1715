"""
Fine-tune a mixture-of-experts model so that it needs few experts at a time, and say what it cost.

    run.py         finetune(): checkpoint and examples in, checkpoint and log out; teacher, control
    training.py    train(): a model in memory and encoded examples in
    trainer.py     transformers' Trainer with our objective: a step, the log, checkpoints
    objective.py   the loss: next tokens plus weighted terms, and what held-out examples make of it
    parts.py       what is trained: routers in full, low-rank updates of experts and attention
    rates.py       ranks and learning rates by the model's shape
    teacher.py     an earlier run, whose hidden states are learned
    own_text.py    anchor text that the base model writes itself
    rows.py        examples in rows, packed or not, in the order of training
    preparing.py   a model made ready to train, and plain again
    adapter.py     what was trained, in memory and in PEFT's files
    saving.py      the result written: a checkpoint, an adapter, or both; an adapter merged
    resume.py      checkpoints of a run that goes on after it was killed
    processes.py   what several processes do together
"""

from melinoe.finetune.objective import held_out_terms
from melinoe.finetune.run import FinetuneResult, finetune
from melinoe.finetune.training import train

__all__ = ["FinetuneResult", "finetune", "held_out_terms", "train"]
