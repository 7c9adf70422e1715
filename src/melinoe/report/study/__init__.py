"""
A study of fine-tunings: many runs with several seeds, each beside its like-for-like control.

    runs.py      records of kind ``study``, gathered by what was varied
    seeds.py     intervals over seeds and items at once
    compare.py   a setting's price over another, its gain against the base
    table.py     one row per setting        figure.py   price against transfers
"""

from melinoe.report.study.figure import frontier
from melinoe.report.study.table import study_tables

__all__ = ["frontier", "study_tables"]
