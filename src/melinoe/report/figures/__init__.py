"""
The figures of a report: each draws what records hold, and says in a sentence what is seen.

    base.py      what a figure is, its colours      svg.py     drawings that follow the page
    locality.py  experts per sequence, spread       usage.py   experts by sequence and layer
    curves.py    hit rate against slots             layers.py  hit rate by layer
    corpora.py   perplexity per corpus              predictor.py  recall beside free rivals
    losses.py    losses over training steps         timeline.py   one generation token by token
"""
