"""Each expert is read alone where the family's rule allows it, and a rule is never guessed at."""

import pytest
import tiny
import torch
from damaged import check_experts

from melinoe.checkpoint import open_checkpoint
from melinoe.checkpoint.files import Place
from melinoe.checkpoint.safetensors_file import SafetensorsFile, TensorInfo
from melinoe.checkpoint.sources import rows_by_trial
from melinoe.errors import UnsupportedModelError

FAMILY = "ernie4_5_vl_moe"  # one list of experts in the files, two stacks in the model


@pytest.fixture(scope="module")
def ernie(tmp_path_factory):
    """A saved model, its weights, and where they are."""
    path = tmp_path_factory.mktemp("ernie")
    saved = tiny.tiny_model(FAMILY)
    saved.save_pretrained(path)
    return path, saved.state_dict()


def test_a_rule_over_all_experts_is_read_expert_by_expert(ernie, monkeypatch):
    """Text and vision experts share a list in the files; one costs its own bytes and no others."""
    path, weights = ernie
    with open_checkpoint(str(path), torch.float32) as checkpoint:
        check_experts(checkpoint, weights)
        read, moved = SafetensorsFile.read, []

        def counting(self, name, into, first=0):
            moved.append(into.numel() * self.tensors[name].dtype.itemsize)
            read(self, name, into, first)

        monkeypatch.setattr(SafetensorsFile, "read", counting)
        for source in checkpoint.experts:
            moved.clear()
            into = {t.name: torch.empty(t.shape) for t in source.layer.tensors}
            source.read(source.num_experts - 1, into)
            assert sum(moved) == source.layer.block_bytes


def test_a_rule_that_is_not_understood_is_refused(ernie, monkeypatch):
    """Where no expert can be read alone, the sentence names the way that remains."""
    monkeypatch.setattr("melinoe.checkpoint.sources.rows_by_trial", lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"no expert can be read alone.*attach"):
        open_checkpoint(str(ernie[0]))


def places(count: int, shape: tuple[int, ...]) -> list[Place]:
    """Stored tensors that are never read."""
    info = TensorInfo(torch.float32, shape, 0, 0)
    return [Place(None, f"experts.{number}.w", info) for number in range(count)]


GATE, UP = places(6, (24, 40)), places(6, (24, 40))
RULES = {
    "one under the other": (
        lambda t: torch.stack([torch.cat(pair) for pair in zip(t["g"], t["u"], strict=True)]),
        lambda e: [GATE[e], UP[e]],
    ),
    "in another order": (
        lambda t: torch.stack([torch.cat([t["u"][5 - e], t["g"][e]]) for e in range(6)]),
        lambda e: [UP[5 - e], GATE[e]],
    ),
    "transposed": (lambda t: torch.stack([*t["g"]]).transpose(1, 2), None),
    "side by side": (
        lambda t: torch.stack([torch.cat(p, 1) for p in zip(t["g"], t["u"], strict=True)]),
        None,
    ),
    "rows interleaved": (
        lambda t: torch.stack(
            [torch.stack(p, 1).flatten(0, 1) for p in zip(t["g"], t["u"], strict=True)]
        ),
        None,
    ),
    "rows turned": (lambda t: torch.stack([*t["g"]]).flip(1), None),
    "columns turned": (lambda t: torch.stack([*t["g"]]).flip(2), None),
    "half of the rows": (lambda t: torch.stack([one.chunk(2)[0] for one in t["g"]]), None),
    "scaled": (lambda t: torch.stack([*t["g"]]) * 2, None),
    "added": (lambda t: torch.stack([a + b for a, b in zip(t["g"], t["u"], strict=True)]), None),
    "one expert short": (lambda t: torch.stack(t["g"][:5]), None),
    "failing": (lambda t: t["nothing"], None),
}


@pytest.mark.parametrize("name", RULES)
def test_only_whole_tensors_one_under_the_other_are_taken_for_rows(name):
    """Six experts of two tensors: where they lie is found, and any other rule is left alone."""
    rule, expected = RULES[name]
    found = rows_by_trial({"g": GATE, "u": UP}, "p", 6, lambda tensors: {"p": rule(tensors)})
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert [list(parts) for parts in zip(*found, strict=True)] == [
            expected(e) for e in range(6)
        ]
