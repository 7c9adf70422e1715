"""Attach with the engine whose decode steps never ask the host."""

from unittest import mock

import melinoe
from melinoe.cache.residency import StreamedPrefill
from melinoe.engine import load


def attach(model, *, staging_experts=load.STAGING_EXPERTS, admit=None, **options):
    """With so many experts in a staging block; a prompt may evict *admit* others, all if absent."""
    with mock.patch.object(load, "STAGING_EXPERTS", staging_experts):
        handle = melinoe.attach(model, engine="fast", **options)
    for one in (handle.engine, *handle._caches):
        name = "prefill" if one is handle.engine else "_prefill"
        setattr(one, name, StreamedPrefill(admit))
    return handle
