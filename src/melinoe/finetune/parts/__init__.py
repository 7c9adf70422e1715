"""
What is trained, and the files it is kept in.

    adapters.py       the trained parts of a model: routers in full, low-rank updates of the rest
    low_rank.py       updates of experts, computed for those that ran
    attention.py      updates of attention projections
    updates.py        what both have in common: left out of a pass, replaced by a teacher's, merged
    peft_layout.py    the same numbers as PEFT lays them out
    adapter.py        what was trained, without its model
    adapter_files.py  adapters in PEFT's files, written and read
    merging.py        an adapter and its base model become a plain checkpoint
    saving.py         what a finished run writes
"""
