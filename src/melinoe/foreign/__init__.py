"""Traces and statistics written elsewhere: a documented table, SGLang's recorder, llama.cpp's."""

from melinoe.foreign.reading import FORMATS, Imported, read_foreign

__all__ = ["FORMATS", "Imported", "read_foreign"]
