"""
Fine-tune a mixture-of-experts model so that it needs few experts at a time, and say what it cost.

    terms/         the objective: next-token loss plus the weighted locality terms
    parts/         what is trained, and the files it is kept in
    price/         the user names the price, the tool finds the strength
    resume/        runs that end early go on as if they had not
    rates.py       learning rates by the model's width
    rows.py        the examples as rows; order.py: which is seen when, decided by the seed alone
    packing.py     several examples in one row, for models that keep them apart
    preparing.py   a model made ready to train, and plain again
    forward.py     one batch through the model, and what each term says of it
    gradients.py   which term pulls at the routers, and how hard
    held_out.py    means of the terms over held-out examples
    trainer.py     transformers' Trainer with that objective; arguments.py: its settings,
                   steps.py: our turns between its steps
    processes.py   what several processes do together
    training.py    train(): a model in memory and encoded examples in
    run.py         finetune(): checkpoint and examples in, checkpoint and log out
    taught.py      the runs that another one needs: its teacher, its control
"""

from melinoe.finetune.held_out import held_out_terms
from melinoe.finetune.run import FinetuneResult, finetune
from melinoe.finetune.taught import finetune_taught
from melinoe.finetune.training import train

__all__ = ["FinetuneResult", "finetune", "finetune_taught", "held_out_terms", "train"]
