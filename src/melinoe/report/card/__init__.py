"""
A checkpoint's model card, written from its ``melinoe.json`` and from nothing else.

    text.py      the card in Markdown, with the hub's front matter
    paid.py      its first sentences: the price, and what it bought
    tables.py    perplexity and locality of each model that was measured
    figures.py   losses, experts per sequence, hit rate against slots, as PNG beside it
    write.py     both into the checkpoint's directory; what a person added stays
"""

from melinoe.report.card.write import write_card

__all__ = ["write_card"]
