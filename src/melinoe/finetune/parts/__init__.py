"""
What is trained, and the files it is kept in.

    adapters.py       the trained parts of a model: routers in full, low-rank updates of the experts
    low_rank.py       those updates, computed for the experts that ran
    peft_layout.py    the same numbers as PEFT lays them out
    adapter_files.py  adapters in PEFT's files, written and read
    merging.py        an adapter and its base model become a plain checkpoint
    saving.py         what a finished run writes
"""
