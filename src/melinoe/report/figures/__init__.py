"""
The figures of a report: each draws what records hold, and says in a sentence what is seen.

    svg.py      a figure; drawings that follow the page's colours
    experts.py  experts that sequences use, how many and which
    caches.py   hit rate against slots, and by layer
    corpora.py  perplexity per corpus
    predictor.py  recall of the predictor and its rivals
    losses.py   losses over training steps
    timeline.py one generation token by token
"""
