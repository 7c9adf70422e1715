"""The formats by name, as users ask for them."""

from __future__ import annotations

from melinoe.errors import UnsupportedModelError
from melinoe.experts.format import PLAIN, ExpertFormat
from melinoe.experts.fp8 import Fp8
from melinoe.experts.int4 import Int4
from melinoe.experts.integer import Integer
from melinoe.experts.mxfp4 import Mxfp4

FORMATS: dict[str, ExpertFormat] = {
    known.name: known
    for known in (
        PLAIN,
        Integer(8),
        Integer(8, 32),
        Integer(8, 128),
        Int4(),
        Int4(64),
        Int4(128),
        Mxfp4(),
        Fp8(),
    )
}


def named_format(name: str) -> ExpertFormat:
    """Look a format up; UnsupportedModelError where there is none of this name."""
    if name not in FORMATS:
        raise UnsupportedModelError(
            f"there is no format {name!r} for experts; choose one of {', '.join(FORMATS)}"
        )
    return FORMATS[name]
