"""
Fine-tune a mixture-of-experts model so that it needs few experts at a time, and say what it cost.

    order.py          which example is seen when; decided by the seed alone
    packing.py        several examples in one row, for models that keep them apart
    adapters.py       what is trained: routers in full, low-rank updates of the experts
    low_rank.py       those updates, computed for the experts that ran
    objective.py      next-token loss plus the weighted locality terms; terms.py, replay.py,
                      base_pass.py: where they come from
    forward.py        one batch through the model, and what each term says of it
    gradients.py      which term pulls at the routers, and how hard
    held_out.py       means of the terms over held-out examples
    trainer.py        transformers' Trainer with that objective; arguments.py: its settings,
                      steps.py: our turns between its steps
    checkpoints.py    a run's checkpoints, whole or not there
    resume.py         what is in them, and how it is put back; random_state.py, interrupt.py
    processes.py      what several processes do together
    training.py       train(): a model in memory and encoded examples in
    run.py            finetune(): checkpoint and examples in, checkpoint and log out
    saving.py         what it writes; adapter_files.py, peft_layout.py, merging.py: as PEFT has it
"""

from melinoe.finetune.held_out import held_out_terms
from melinoe.finetune.run import FinetuneResult, finetune
from melinoe.finetune.training import train

__all__ = ["FinetuneResult", "finetune", "held_out_terms", "train"]
