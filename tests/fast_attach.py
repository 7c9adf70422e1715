"""Attach with the engine whose decode steps never ask the host."""

from functools import partial

import melinoe

attach = partial(melinoe.attach, engine="fast")
