"""Count what serving experts costs, by phase and layer, and give the rates that follow."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from melinoe.cache.residency import Decision, Stream

PHASES = ("prompt", "completion")
PROMPT, COMPLETION = 0, 1

# Counts by their names: int64 (2, layers), (layers,) and (2,), phases in the order of PHASES.
_BY_PHASE_AND_LAYER = ("uses", "hits", "loads", "requests", "chunked", "on_host")
_BY_PHASE = ("tokens", "forwards", "zero_miss_forwards", "zero_miss_tokens")
_ALL = (*_BY_PHASE_AND_LAYER, "prefetch_loads", *_BY_PHASE)


class Counters:
    """
    Counts of one run, all of them whole numbers; rates are None where nothing was counted.

    By phase and layer, int64 (2, layers), phases in the order of `PHASES`: ``uses``, (token,
    choice) pairs that chose an expert; ``hits``, those whose expert was resident when its request
    began; ``loads``, experts copied in on demand; ``requests``, and ``chunked``, those that took
    more than one decision; ``on_host``, missing experts that the host computed. By layer:
    ``prefetch_loads``, experts copied in ahead. By phase, int64 (2,), of finished passes:
    ``tokens``, rows with padding; ``forwards``; ``zero_miss_forwards`` and ``zero_miss_tokens``, of
    passes that waited in no layer.
    """

    def __init__(self, num_layers: int):
        if num_layers < 1:
            raise ValueError(f"counters need at least one layer, not {num_layers}")
        self.num_layers = num_layers
        self.reset()

    def reset(self) -> None:
        """Set everything to zero."""
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_ALL, (2,))
        shapes |= dict.fromkeys(_BY_PHASE_AND_LAYER, (2, self.num_layers))
        shapes["prefetch_loads"] = (self.num_layers,)
        self._counts = {name: np.zeros(shape, np.int64) for name, shape in shapes.items()}
        self._now: int | None = None  # phase of the open pass
        self._now_tokens = self._now_misses = 0

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in _ALL:
            raise AttributeError(name)
        return self._counts[name].copy()

    # --- counting -------------------------------------------------------------------------------

    def begin_forward(self, phase: int | str, tokens: int) -> None:
        """Begin a pass of *tokens* rows; one left open is dropped, though its requests count."""
        self._now = _number(phase)
        self._now_tokens, self._now_misses = tokens, 0

    def add_request(
        self, layer: int, uses: int, hits: int, loads: int, decisions: int = 1, on_host: int = 0
    ) -> None:
        """Count one request of the open pass: *uses* pairs, *hits* of them on resident experts."""
        phase, counts = self._now, self._counts
        if phase is None:
            raise ValueError("a request was counted outside a forward pass; begin_forward first")
        counts["uses"][phase, layer] += uses
        counts["hits"][phase, layer] += hits
        counts["requests"][phase, layer] += 1
        if loads or on_host:
            counts["loads"][phase, layer] += loads
            counts["on_host"][phase, layer] += on_host
            self._now_misses += loads + on_host
        if decisions > 1:
            counts["chunked"][phase, layer] += 1

    def add_decisions(
        self,
        layer: int,
        experts: Sequence[int],
        uses: Sequence[int],
        decisions: Sequence[Decision],
        on_host: Sequence[int] = (),
    ) -> None:
        """Count one request from the *decisions* that served it, in order."""
        if len(experts):
            first, loads = decisions[0], sum(len(one.loads) for one in decisions)
            hits = _uses_of(first.hits, experts, uses) if loads or on_host else sum(uses)
            self.add_request(layer, sum(uses), hits, loads, len(decisions), len(on_host))

    def add_stream(
        self, layer: int, experts: Sequence[int], uses: Sequence[int], stream: Stream
    ) -> None:
        """Count one request of a prompt that was streamed; *experts* and *uses* are parallel."""
        if len(experts):
            hits = _uses_of(stream.hits, experts, uses)
            self.add_request(layer, sum(uses), hits, stream.loads)

    def add_prefetch(self, layer: int, loads: int) -> None:
        """Count experts copied in ahead of need; belongs to no phase."""
        self._counts["prefetch_loads"][layer] += loads

    def end_forward(self) -> None:
        """End the open pass, and count its tokens."""
        phase, counts = self._now, self._counts
        if phase is None:
            raise ValueError("a forward pass was ended that had not begun")
        counts["forwards"][phase] += 1
        counts["tokens"][phase] += self._now_tokens
        if not self._now_misses:
            counts["zero_miss_forwards"][phase] += 1
            counts["zero_miss_tokens"][phase] += self._now_tokens
        self._now = None

    # --- rates ----------------------------------------------------------------------------------

    def _sum(self, name: str, phase: int | str | None) -> int:
        values = self._counts[name]
        return int(values.sum() if phase is None else values[_number(phase)].sum())

    def hit_rate(self, phase: int | str | None = None) -> float | None:
        """Share of uses whose expert was resident."""
        return _rate(self._sum("hits", phase), self._sum("uses", phase))

    def adjusted_hit_rate(self, phase: int | str | None = None) -> float | None:
        """1 - (loads + all prefetch loads + experts computed by the host) / uses."""
        uses = self._sum("uses", phase)
        loads = self._sum("loads", phase) + self._sum("on_host", phase)
        loads += self._sum("prefetch_loads", None)
        return 1 - loads / uses if uses else None

    def transfers_per_token(self, phase: int | str = "completion") -> float | None:
        """Demand loads of all layers per token of *phase*."""
        return _rate(self._sum("loads", phase), self._sum("tokens", phase))

    def prefetch_per_token(self) -> float | None:
        """Prefetch loads of all layers per completion token."""
        return _rate(self._sum("prefetch_loads", None), self._sum("tokens", COMPLETION))

    def on_host_per_token(self, phase: int | str = "completion") -> float | None:
        """Experts of all layers that the host computed, per token."""
        return _rate(self._sum("on_host", phase), self._sum("tokens", phase))

    def zero_miss_share(self, phase: int | str = "completion") -> float | None:
        """Share of the tokens of *phase* that waited for no expert."""
        return _rate(self._sum("zero_miss_tokens", phase), self._sum("tokens", phase))

    def metrics(self) -> dict[str, float | None]:
        """Rates by their names in reports; of the completion unless the name says otherwise."""
        return {
            "hit_rate": self.hit_rate("completion"),
            "adjusted_hit_rate": self.adjusted_hit_rate("completion"),
            "transfers_per_token": self.transfers_per_token("completion"),
            "prefetch_per_token": self.prefetch_per_token(),
            "zero_miss_tokens": self.zero_miss_share("completion"),
            "prompt_hit_rate": self.hit_rate("prompt"),
            "prompt_transfers_per_token": self.transfers_per_token("prompt"),
        }

    # --- as values ------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; `from_dict` reads them back."""
        counts = {name: self._counts[name].tolist() for name in _ALL}
        return {"num_layers": self.num_layers, **counts}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Counters":
        """Read what `to_dict` wrote; ValueError for a field missing, unknown or misshapen."""
        counters = cls(int(values.get("num_layers", 0)))
        odd = sorted(values.keys() ^ {"num_layers", *_ALL})
        if odd:
            raise ValueError(f"not a dictionary of counters: check {', '.join(odd)}")
        for name, kept in counters._counts.items():
            array = np.asarray(values[name])
            if array.shape != kept.shape or array.dtype.kind not in "iu":
                raise ValueError(f"not a dictionary of counters: {name} has another shape")
            kept[:] = array
        return counters

    def copy(self) -> "Counters":
        """An independent copy; an open forward pass is not in it."""
        return self.plus(Counters(self.num_layers))

    def plus(self, other: "Counters", sign: int = 1) -> "Counters":
        """Both together."""
        if self.num_layers != other.num_layers:
            raise ValueError(f"counters of {self.num_layers} and of {other.num_layers} layers")
        result = Counters(self.num_layers)
        for name, kept in result._counts.items():
            kept[:] = self._counts[name] + sign * other._counts[name]
        return result

    def minus(self, other: "Counters") -> "Counters":
        """Counts since *other*, an earlier copy."""
        return self.plus(other, -1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counters) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Counters({self.to_dict()})"


def _number(phase: int | str) -> int:
    return PHASES.index(phase) if isinstance(phase, str) else phase


def _rate(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _uses_of(chosen: Sequence[int], experts: Sequence[int], uses: Sequence[int]) -> int:
    """Sum of the *uses* of those of *experts* that are *chosen*."""
    of = dict(zip(experts, uses, strict=True))
    return sum(of[expert] for expert in chosen)
