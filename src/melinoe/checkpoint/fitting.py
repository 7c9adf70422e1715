"""Whether the stored tensors of an expert-wise rule are all there and of the right shapes."""

import re
from collections.abc import Callable, Mapping, Sequence

import torch

from melinoe.checkpoint.files import Place
from melinoe.checkpoint.safetensors_file import describe_shape
from melinoe.errors import CheckpointError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def check_complete(
    tensors: Mapping[str, Sequence[Place]],
    patterns: Sequence[str],
    parameter: str,
    expected: int | None,
) -> None:
    """
    Every pattern of an expert-wise rule needs one tensor for each expert, 0 to the last.

    Args:
        tensors: Source pattern -> stored tensors.
        patterns: All source patterns of the rule.
        parameter: What the rule makes, for messages.
        expected: Experts; None where the rule makes several parameters of one list.

    Raises:
        CheckpointError: tensors are missing, too many, or of other experts.
    """
    for pattern in patterns:
        places = tensors.get(pattern, ())
        found = len(places)
        needs = (
            f"{parameter} needs {expected or 'its'} tensors {pattern} and the checkpoint has "
            f"{found or 'none'}"
        )
        if expected is not None and found > expected:
            raise CheckpointError(
                f"{needs}; the weights are of another model than the config, use one model's"
            )
        if found == 0 or (expected is not None and found < expected):
            raise CheckpointError(
                f"{needs}; a shard or a part of its index is missing, download it again"
            )
        numbers = _numbers(pattern, [place.name for place in places])
        if numbers is not None and numbers != list(range(found)):
            raise CheckpointError(
                f"{needs}, but has them for experts {', '.join(map(str, numbers))}; a shard or a "
                "part of its index is missing, download it again"
            )


def _numbers(pattern: str, names: list[str]) -> list[int] | None:
    """The experts' numbers in stored names, where *pattern* has ``*``; None where it has none."""
    found = [_NUMBER.findall(name) for name in names]
    return [int(numbers[-1]) for numbers in found] if ".*." in pattern and all(found) else None


def check_shape(
    made: Callable[[], torch.Tensor], parameter: str, shape: tuple[int, ...], place: Place
) -> None:
    """
    Try a rule on shapes alone.

    Args:
        made: Runs the rule; the tensor may be on the meta device.
        parameter: What the rule makes.
        shape: What shape that must have.
        place: One of the stored tensors, for messages.

    Raises:
        CheckpointError: the rule fails, or makes another shape.
    """
    try:
        got = tuple(made().shape)
    except Exception as error:
        raise CheckpointError(
            f"{parameter} cannot be made from {place.name} and its like, of shape "
            f"{describe_shape(place.info.shape)} ({error}); the weights are of "
            "another model than the config"
        ) from None
    if got != shape:
        raise mismatch(parameter, shape, place)


def mismatch(parameter: str, shape: tuple[int, ...], place: Place) -> CheckpointError:
    """The error of a stored tensor that does not fit what the model needs."""
    return CheckpointError(
        f"{place.name} has shape {describe_shape(place.info.shape)}, which does not fit "
        f"{parameter} of shape {describe_shape(shape)}; the weights are of another model than "
        "the config"
    )
