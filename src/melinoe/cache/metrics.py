"""Metrics: rates and shares, worked out of counts; defined once for the whole project."""

import numpy as np

PHASES = ("prompt", "completion")
PROMPT, COMPLETION = 0, 1


def phase_number(phase: int | str) -> int:
    """Make a phase by its name, or by its number already, its number."""
    return PHASES.index(phase) if isinstance(phase, str) else phase


class Metrics:
    """
    What `melinoe.cache.counters.Counters` come to; each is None where nothing was counted.

    Source:
        Metrics as defined once for the project; hit rates count uses, transfers count copies,
        and an eviction copies nothing.
    """

    prefetch_loads: np.ndarray
    prefetch_used: np.ndarray

    def _sum(self, name: str, phase: int | str | None) -> int:
        values = getattr(self, name)
        return int(values.sum() if phase is None else values[phase_number(phase)].sum())

    def hit_rate(self, phase: int | str | None = None) -> float | None:
        """Share of uses whose expert was resident; None if there was no use."""
        uses = self._sum("uses", phase)
        return self._sum("hits", phase) / uses if uses else None

    def adjusted_hit_rate(self, phase: int | str | None = None) -> float | None:
        """
        1 - (demand + prefetch loads + experts computed by the host) / uses.

        Prefetches are charged in full to any phase.
        """
        uses = self._sum("uses", phase)
        loads = self._sum("loads", phase) + self._sum("on_host", phase)
        loads += int(self.prefetch_loads.sum())
        return 1 - loads / uses if uses else None

    def transfers_per_token(self, phase: int | str = "completion") -> float | None:
        """Demand loads of all layers per token of *phase*; None if it had no token."""
        tokens = self._sum("tokens", phase)
        return self._sum("loads", phase) / tokens if tokens else None

    def prefetch_per_token(self) -> float | None:
        """Prefetch loads of all layers per completion token; None if there was none."""
        tokens = self._sum("tokens", COMPLETION)
        return int(self.prefetch_loads.sum()) / tokens if tokens else None

    def prefetch_precision(self) -> float | None:
        """
        Share of the experts copied ahead that a request asked for before they left.

        What is resident still and waits for its first use counts as not used. The literature on
        hardware prefetchers calls it accuracy. None if nothing was copied ahead.
        """
        loads = int(self.prefetch_loads.sum())
        return self._sum("prefetch_used", None) / loads if loads else None

    def prefetch_recall(self) -> float | None:
        """
        Share of what the completion's passes would have missed that was copied ahead in time.

        Those copied ahead whose first use came in a pass of the completion, over the same and all
        that such passes still missed: loaded on demand or computed by the host. What a prefetch
        displaced and made to be loaded again is in the latter. The literature on hardware
        prefetchers calls it coverage. None if nothing was copied ahead, or the completion would
        have missed nothing.
        """
        if not self.prefetch_loads.any():
            return None
        used = self._sum("prefetch_used", COMPLETION)
        missed = self._sum("loads", COMPLETION) + self._sum("on_host", COMPLETION)
        return used / (used + missed) if used + missed else None

    @property
    def prefetch_unused(self) -> np.ndarray:
        """Waste: experts copied ahead and not used so far, int64 (layers,)."""
        return self.prefetch_loads - self.prefetch_used.sum(axis=0)

    def prefetch_waste_per_token(self) -> float | None:
        """
        Experts copied ahead and not used, per completion token.

        None if nothing was copied ahead, or there was no such token.
        """
        tokens = self._sum("tokens", COMPLETION) if self.prefetch_loads.any() else 0
        return int(self.prefetch_unused.sum()) / tokens if tokens else None

    def on_host_per_token(self, phase: int | str = "completion") -> float | None:
        """Experts of all layers computed where they live, per token; None if there was none."""
        tokens = self._sum("tokens", phase)
        return self._sum("on_host", phase) / tokens if tokens else None

    def zero_miss_share(self, phase: int | str = "completion") -> float | None:
        """Share of the tokens of *phase* that waited for no expert; None if it had none."""
        tokens = self._sum("tokens", phase)
        return self._sum("zero_miss_tokens", phase) / tokens if tokens else None

    def metrics(self) -> dict[str, float | None]:
        """The measures by their names in reports; of the completion unless the name says else."""
        return {
            "hit_rate": self.hit_rate("completion"),
            "adjusted_hit_rate": self.adjusted_hit_rate("completion"),
            "transfers_per_token": self.transfers_per_token("completion"),
            "prefetch_per_token": self.prefetch_per_token(),
            "prefetch_precision": self.prefetch_precision(),
            "prefetch_recall": self.prefetch_recall(),
            "prefetch_waste_per_token": self.prefetch_waste_per_token(),
            "zero_miss_tokens": self.zero_miss_share("completion"),
            "prompt_hit_rate": self.hit_rate("prompt"),
            "prompt_transfers_per_token": self.transfers_per_token("prompt"),
        }
