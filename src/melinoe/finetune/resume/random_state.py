"""The state of every random number generator of a process, as one tensor."""

import random

import numpy as np
import torch
from torch import Tensor

_TWISTER = 624  # words of the generator that Python and NumPy share


def random_state() -> Tensor:
    """
    States of Python, NumPy, torch and, where there is one, the current CUDA device: int64 ``(n,)``.

    The same length on every process of a run, so that it can be gathered.
    """
    _, words, spare = random.getstate()
    _, keys, position, has_spare, cached = np.random.get_state()
    parts = [
        torch.tensor(words),
        _bits(spare),
        torch.from_numpy(np.asarray(keys).astype(np.int64)),
        torch.tensor([int(position), int(has_spare)]),
        _bits(float(cached)),
        torch.get_rng_state().view(torch.int64),
    ]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_rng_state().view(torch.int64))
    return torch.cat(parts)


def set_random_state(state: Tensor) -> None:
    """Put back what `random_state` gave; a CUDA state is left out on a machine without CUDA."""
    sizes = [_TWISTER + 1, 2, _TWISTER, 2, 2, torch.get_rng_state().numel() // 8]
    words, spare, keys, place, cached, cpu, cuda = state.cpu().split(
        [*sizes, state.numel() - sum(sizes)]
    )
    random.setstate((3, tuple(words.tolist()), _number(spare)))
    position, has_spare = place.tolist()
    numpy_keys = keys.numpy().astype(np.uint32)
    np.random.set_state(("MT19937", numpy_keys, position, has_spare, _number(cached) or 0.0))
    # A copy of its own: torch reads a generator's state from the start of the storage.
    torch.set_rng_state(cpu.clone().view(torch.uint8))
    if cuda.numel() and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda.clone().view(torch.uint8))


def _bits(number: float | None) -> Tensor:
    """Whether there is a number, and its bits."""
    value = torch.tensor([0.0 if number is None else number], dtype=torch.float64)
    return torch.cat([torch.tensor([int(number is not None)]), value.view(torch.int64)])


def _number(bits: Tensor) -> float | None:
    return float(bits[1:].clone().view(torch.float64)) if bits[0] else None
