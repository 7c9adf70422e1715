"""Turn tokens into text as they come, and end it before a stop string."""

from __future__ import annotations

from typing import Any

from tokenizers.decoders import DecodeStream


class Text:
    """
    The text of one choice.

    Args:
        tokenizer: transformers' fast tokenizer.
        stop: The text ends before the first of these.
        special: Whether special tokens are written, for a parser that reads them.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], special: bool = False) -> None:
        self._tokenizer, self._stop = tokenizer._tokenizer, stop
        self._stream = DecodeStream([], skip_special_tokens=not special)
        self._held = ""
        self.stopped = False

    def add(self, tokens: list[int]) -> str:
        """Give what can be shown now."""
        for token in tokens:
            if self.stopped:
                break
            self._held += self._stream.step(self._tokenizer, token) or ""
            found = [at for at in map(self._held.find, self._stop) if at >= 0]
            if found:
                self._held, self.stopped = self._held[: min(found)], True
        # The end may turn out to begin a stop string.
        begun = (
            n for stop in self._stop for n in range(len(stop)) if self._held.endswith(stop[:n])
        )
        keep = 0 if self.stopped else max(begun, default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[-keep:] if keep else ""
        return shown

    def rest(self) -> str:
        """Give what was held back, once no more tokens come."""
        shown, self._held = self._held, ""
        return shown
