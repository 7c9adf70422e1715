"""
The user names the price, the tool finds the strength.

    search.py         finetune_within(): the control, then one strength after the other
    strength.py       which strength to try next
    steering.py       or the strength changed on the way, within one run
    reference.py      the control that prices are held against
    panel.py          the held-out texts: those that choose, those that judge
    reading.py        what a model in training makes of them
"""
