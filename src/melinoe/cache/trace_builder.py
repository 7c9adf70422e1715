"""Forward passes collected into a trace, whatever ids a model wrote for "no expert"."""

from collections.abc import Mapping

import numpy as np

from melinoe.cache.trace import PADDING_ROW, Trace


def known_ids(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """
    Ids as a trace holds them: int16, -1 wherever no expert is meant.

    Args:
        ids: Any integers. A negative id means no expert, and so does one at or above
            *num_experts*: what some families write for a skipped choice.
        num_experts: Of the layer that the ids are of.
    """
    return np.where((ids >= 0) & (ids < num_experts), ids, -1).astype(np.int16)


def _whole(
    name: str, values: np.ndarray | int, shape: tuple[int, ...], dtype: type[np.integer], most: int
) -> np.ndarray:
    """Numbers from 0 to *most* as *dtype*, which would wrap others round."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or (array.size and not 0 <= array.min() <= array.max() <= most):
        raise ValueError(f"{name} must be whole numbers from 0 to {most}")
    return np.broadcast_to(array.astype(dtype), shape).copy()


class TraceBuilder:
    """
    Collects forward passes into a `Trace`.

    Args:
        num_layers: MoE layers.
        num_experts: Experts of each layer.
        top_k: Choices per token and layer.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int):
        self._shape = (num_layers, top_k)
        self._num_experts = num_experts
        self._experts: list[np.ndarray] = []
        self._sequence: list[np.ndarray] = []
        self._kind: list[np.ndarray] = []
        self._scores: list[np.ndarray] = []
        self._guesses: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._experts)

    def add_forward(
        self,
        experts: np.ndarray,
        sequence: np.ndarray | int,
        kind: np.ndarray | int,
        scores: np.ndarray | None = None,
        guesses: np.ndarray | None = None,
    ) -> None:
        """
        Append one forward pass.

        Args:
            experts: Any integers (rows, layers, top_k); a negative id, or one at or above
                num_experts (what some families write for a skipped choice), means no expert.
            sequence: Which prompt each row belongs to, (rows,) or one for all.
            kind: 0 prompt, 1 completion, 2 padding, (rows,) or one for all.
            scores: The router's weights, as *experts*; of all passes or of none.
            guesses: What each layer's router said one layer early, as *experts*; likewise.

        Raises:
            ValueError: another shape, what is no whole number or beyond those of a trace, or scores
                or guesses of some passes only.
        """
        experts = np.asarray(experts)
        if experts.dtype.kind not in "iu":
            raise ValueError(f"experts must be whole numbers, not {experts.dtype}")
        if experts.ndim != 3 or experts.shape[1:] != self._shape:
            raise ValueError(
                f"experts has shape {experts.shape}, not (rows, {self._shape[0]}, {self._shape[1]})"
            )
        if bool(self._scores) != (scores is not None) and self._experts:
            raise ValueError("scores must be given for all forward passes, or for none")
        if bool(self._guesses) != (guesses is not None) and self._experts:
            raise ValueError("guesses must be given for all forward passes, or for none")
        ids = known_ids(experts, self._num_experts)
        if scores is not None:
            weights = np.broadcast_to(np.asarray(scores), experts.shape)
            self._scores.append(np.where(ids >= 0, weights, 0).astype(np.float16))
        if guesses is not None:
            early = np.broadcast_to(np.asarray(guesses), experts.shape)
            self._guesses.append(known_ids(early, self._num_experts))
        self._experts.append(ids)
        rows = (len(experts),)
        self._sequence.append(_whole("sequence", sequence, rows, np.int32, np.iinfo(np.int32).max))
        self._kind.append(_whole("kind", kind, rows, np.uint8, PADDING_ROW))

    def trace(
        self,
        model: str = "",
        fingerprint: str = "",
        versions: Mapping[str, str] | None = None,
        note: str = "",
    ) -> Trace:
        """Everything so far, as one trace; more can be added afterwards."""
        lengths = [len(rows) for rows in self._experts]
        none = np.zeros(0, np.int64)
        return Trace(
            experts=np.concatenate([np.zeros((0, *self._shape), np.int16), *self._experts]),
            forward=np.repeat(np.arange(len(lengths)), lengths or none).astype(np.int32),
            sequence=np.concatenate([none.astype(np.int32), *self._sequence]),
            kind=np.concatenate([none.astype(np.uint8), *self._kind]),
            num_experts=self._num_experts,
            model=model,
            fingerprint=fingerprint,
            versions=versions or {},
            note=note,
            scores=np.concatenate(self._scores) if self._scores else None,
            guesses=np.concatenate(self._guesses) if self._guesses else None,
        )
