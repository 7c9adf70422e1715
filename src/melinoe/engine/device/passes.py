"""Follow forward passes, and tell for each whether the device or the host decides its loads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from melinoe.cache.counters import COMPLETION, PROMPT, Counters
from melinoe.engine.passes import Batch, ForwardPasses, Generating, describe_call

_log = logging.getLogger("melinoe")

# How the loads of a pass are decided: by the device; by the host, streamed past the slots; by the
# host, in parts that fit the slots.
DEVICE, STREAM, PARTS = "device", "stream", "parts"


class DevicePasses(ForwardPasses):
    """
    Follows the passes of a model whose device decides what most of them load.

    A prompt is streamed. A pass of the completion is decided by the device if it *fits*: its tokens
    can never need more experts of a layer than it has slots; otherwise by the host, in parts,
    counted and logged. A pass of continuous batching (*paged*) has no phase: if it fits, it counts
    as completion; else it is streamed, evicts no expert, and counts as prompt. *given* is the call
    that the next passes belong to, where asking the cache would wait; *unasked* is called for each
    decode step that nobody captures.
    """

    def __init__(
        self, model: nn.Module, counters: Counters, fits: Callable[[int, int], bool], most: int
    ) -> None:
        super().__init__(model, counters)
        self._fits, self._most = fits, most
        self._tokens = self._top_k = 0
        self.mode = DEVICE
        self.paged = self._only_decodes = False
        self.given: Batch | None = None
        self.unasked: Callable[[], None] | None = None
        self.generation_begins: Callable[[], None] | None = None

    def enter(self, layer: int, top_k_index: Tensor) -> None:
        """Begin a pass if need be; all layers of a pass compute the same number of tokens."""
        tokens, self._top_k = top_k_index.shape
        if self._seen and tokens != self._tokens:
            self.end()  # an encoder's and a decoder's, say: one may fit the slots, the other not
        self._tokens = tokens
        super().enter(layer, top_k_index)

    def in_prompt(self, inputs: Mapping[str, Any]) -> bool:
        """Tell whether a call with *inputs* is one of several parts of a prompt."""
        generating = self._generating
        if generating is None or not generating.chunked:
            return False
        call = describe_call((), inputs, generating)  # waits for the device, until the prompt ends
        generating.chunked = call is not None and call.phase == PROMPT
        return generating.chunked

    def end(self) -> None:
        """End the open pass; the device has counted its own."""
        if self.mode != DEVICE:
            super().end()
        elif self._seen:
            self._end_uncounted()

    def completion_begins(self) -> None:
        """Begin a pass of the completion that is replayed, so that nothing else tells."""
        self._completion_begins()

    def _begin(self, tokens: int) -> None:
        self.end()
        call = self._call
        phase = call.phase if call is not None else (COMPLETION if tokens == 1 else PROMPT)
        fits = self._fits(tokens, self._top_k)
        if self.paged:
            self.mode, phase = (DEVICE, COMPLETION) if fits else (STREAM, PROMPT)
        elif phase == PROMPT:
            self.mode = STREAM
        else:
            self.mode = DEVICE if fits else PARTS
        if self.mode == PARTS or (self.paged and self._only_decodes and not fits):
            self._note_fallback(tokens)
        elif self.mode == DEVICE and self.unasked and self.given is None and not self.paged:
            self.unasked()
        if phase == COMPLETION:
            self._completion_begins()
        if self.mode != DEVICE:
            self.counters.begin_forward(phase, tokens)
        self._tell(phase, tokens)

    def _note_fallback(self, tokens: int) -> None:
        if not self.fallbacks:
            _log.warning(
                "decode steps of %d tokens may need more experts of a layer than it has slots, so "
                "the host decides, as slowly as in the reference engine; raise the slots to %d, or "
                "decode fewer sequences at once", tokens, min(tokens * self._top_k, self._most),
            )  # fmt: skip
        self.fallbacks += 1

    def _before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.given is not None:
            self._call, self.paged = self.given, False
            return
        super()._before(args, kwargs)
        self.paged = "cu_seq_lens_q" in kwargs
        # transformers 5.17 calls it max_seqlen_q.
        self._only_decodes = kwargs.get("max_length_q", kwargs.get("max_seqlen_q")) == 1

    @contextmanager
    def generate(self, generating: Generating | None) -> Iterator[None]:
        """Follow a `generate`, after its beginning was announced."""
        with self.lock:
            if self._generating is None and self.generation_begins is not None:
                self.generation_begins()
            with super().generate(generating):
                yield
