"""Sort a checkpoint's tensors by the parameter of the model that they belong to."""

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from melinoe.checkpoint.packed import Weights
from melinoe.errors import CheckpointError, UnsupportedModelError
from melinoe.moe.experts import PLAIN_DTYPES


class Group(NamedTuple):
    """Hold the stored tensors that one rule turns into one or more parameters of the model."""

    target: str  # the first of the parameters, by its full name in the model
    targets: tuple[str, ...]
    converter: WeightConverter | None  # None: a renaming at most
    tensors: dict[str, list[Weights]]  # source pattern -> tensors, in transformers' order

    @property
    def places(self) -> list[Weights]:
        """List all stored tensors of the group."""
        return [place for part in self.tensors.values() for place in part]

    @property
    def operations(self) -> list:
        """List the steps of the rule."""
        return [] if self.converter is None else list(self.converter.operations)

    def is_stored_as(self, shape: tuple[int, ...]) -> bool:
        """Whether the one stored tensor is the parameter, which has this *shape*."""
        operations = self.operations
        if len(operations) == 1 and getattr(operations[0], "check_dims", False):
            # A transposition that leaves a tensor of the right shape alone.
            return self.places[0].info.shape == shape
        return not operations

    def convert(
        self, pieces: dict[str, list[Tensor]], shapes: dict[str, tuple[int, ...]], config: Any
    ) -> dict[str, Tensor]:
        """
        Run the rule on *pieces*.

        Args:
            pieces: Source pattern -> tensors, in the group's order.
            shapes: Full name -> shape of the parameters that the rule may ask for.
            config: The model's config, which some rules look into.

        Returns:
            Full parameter name -> tensor.
        """
        converter: Any = deepcopy(self.converter)
        for pattern, tensors in pieces.items():
            for tensor in tensors:
                converter.add_tensor(self.target, pattern, pattern, tensor)
        made = converter.convert(self.target, model=_Shapes(shapes), config=config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


class _Shapes:
    """Stand in for the model where a rule asks it for a parameter's shape."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], device="meta")


def group_by_parameter(model: Any, places: Mapping[str, Weights]) -> dict[str, Group]:
    """
    Apply transformers' renamings and rules to every stored name.

    Returns full name of a parameter (of the first, where a rule makes several) -> the stored
    tensors that make it. Names that the model does not know are kept under the name they would
    have.

    Raises:
        CheckpointError: two stored tensors are the same parameter.

    Source:
        `convert_and_load_state_dict_in_model` of transformers 5.23, whose order of tensors within
        a group and whose second try without renaming are kept.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    rule_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known = model.state_dict()
    prefix = model.base_model_prefix
    groups: dict[str, Group] = {}
    for key in sorted(places, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if target not in known and key in known:
            target, pattern = rename_source_key(key, [], [], prefix, known)
        rule = None if pattern is None else rule_of[pattern]
        if target not in groups:
            groups[target] = Group(target, _targets(target, rule), rule, {})
        same = groups[target].tensors.setdefault(pattern or key, [])
        if len(groups[target].tensors) > 1 and rule is None:
            first = next(iter(groups[target].tensors))
            raise CheckpointError(
                f"the stored tensors {first} and {key} are both the model's {target}; delete the "
                "one that is not meant, or download the checkpoint again"
            )
        same.append(places[key])
    return groups


def _targets(target: str, rule: WeightConverter | None) -> tuple[str, ...]:
    """Name all parameters that a rule makes, from the first one's name."""
    if rule is None or len(rule.target_patterns) == 1:
        return (target,)
    first = rule.target_patterns[0]
    return tuple(target.replace(first, pattern, 1) for pattern in rule.target_patterns)


def refuse_integers(model: Any, groups: dict[str, Group]) -> None:
    """
    Refuse weights of types that only mean something together with scales.

    Raises:
        CheckpointError: a parameter of *model* is stored as integers or in eight bits.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for group in groups.values():
        if not any(target in parameters for target in group.targets):
            continue
        for place in group.places:
            if place.info.dtype not in PLAIN_DTYPES:
                raise CheckpointError(
                    f"{place.name} is stored as {str(place.info.dtype).removeprefix('torch.')}, "
                    "which means something only with scales, and the checkpoint has none for it; "
                    "download it again, or take one that is not quantised"
                )


def split(
    groups: dict[str, Group], experts: Collection[str]
) -> tuple[dict[str, Group], list[Weights]]:
    """
    Part the experts' tensors from all others.

    Returns full name -> group for each of *experts*, names of parameters, that the checkpoint has;
    and the places of all other tensors, which make the backbone.

    Raises:
        UnsupportedModelError: one rule makes an expert's parameter and another one together.
    """
    wanted = set(experts)
    of_expert: dict[str, Group] = {}
    backbone: list[Weights] = []
    for group in groups.values():
        hits = wanted.intersection(group.targets)
        if not hits:
            backbone += group.places
        elif len(hits) < len(group.targets):
            raise UnsupportedModelError(
                f"this family's checkpoint keeps {sorted(hits)[0]} together with weights that are "
                "no experts, so its experts cannot be read alone; load it with from_pretrained and "
                "use melinoe.attach"
            )
        else:
            of_expert |= dict.fromkeys(hits, group)
    return of_expert, backbone
