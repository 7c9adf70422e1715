"""
Runs that end early go on as if they had not.

    checkpoints.py    a run's checkpoints: whole, or not there
    state.py          what is in them, and how it is put back
    random_state.py   every generator's state as one tensor
    finished.py       a result that was written, and taken for a resumed call's own
    interrupt.py      Ctrl-C and SIGTERM end the run after its step
"""
