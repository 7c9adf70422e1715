"""Rows and their order, by the seed alone; packed, each example is trained as if it were alone."""

import random
from dataclasses import replace

import pytest
import torch
from small_runs import examples, settings, trained
from tiny import tiny_model

from melinoe.config import FinetuneSettings
from melinoe.data import IGNORED, Collator, Encoded, PackedCollator
from melinoe.errors import UnsupportedModelError
from melinoe.finetune.objective import Objective
from melinoe.finetune.parts import make_trainable
from melinoe.finetune.rows import (
    Packing,
    find_packing,
    leaks,
    number_of_steps,
    pack,
    training_order,
    training_rows,
)
from melinoe.moe.experts import find_experts
from melinoe.moe.routing import find_routers

# How each keeps examples apart: by positions, or by masks that it has to be given.
FAMILIES = {"olmoe": False, "qwen3_moe": False, "deepseek_v3": False, "gpt_oss": True}


def gradients_of(model, parts, objective, batches):
    """Terms summed over *batches*, and the gradient of their total, with one denominator."""
    count = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    sums = {}
    for batch in batches:
        terms = objective.measure(model, batch, count, training=True)
        terms.total.backward()
        for name, value in terms.detached().items():
            sums[name] = sums.get(name, 0.0) + float(value)
    gradients = [p.grad.clone() for p in parts.all()]
    model.zero_grad()
    return sums, gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_examples_have_the_terms_and_gradients_they_have_alone(family):
    """Five examples in two rows, against one forward pass for each, in float64."""
    model = tiny_model(family, dtype=torch.float64)
    # A capacity of 2 of 8: more, and no cache entry of these short examples is ever clipped.
    chosen = settings(capacity=0.25, gamma=0.7, lambda_cache=0.7, lambda_rank=0.3)
    routers = find_routers(model)
    objective = Objective(routers, chosen)
    parts = make_trainable(model, routers, find_experts(model), chosen, rank=2)
    with torch.no_grad():
        for parameter in parts.all():  # away from the base routers and from updates of zero
            parameter.data = parameter.data.double()
            parameter.add_(0.05 * torch.randn_like(parameter))
    data = examples(5)
    packing = find_packing(model, 0)
    assert (packing.config is not None) == FAMILIES[family]
    packed = packing.inputs(packing.collator([data[:3], data[3:]]))
    assert int((packed["segment_ids"] < 0).sum()) > 0
    alone = [Collator(0)([one]) for one in data]
    ours, our_gradients = gradients_of(model, parts, objective, [packed])
    theirs, their_gradients = gradients_of(model, parts, objective, alone)
    assert {"nll", "cache", "anchor", "total"} <= ours.keys()
    assert all(value > 0 for value in ours.values())
    assert ours == pytest.approx(theirs, rel=2e-6)
    for one, other in zip(our_gradients, their_gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_an_example_that_saw_the_one_before_it_would_be_noticed():
    """The same comparison fails where positions run on, as if the row were one text."""
    model, data = tiny_model("olmoe"), examples(3)
    objective = Objective(find_routers(model), settings())
    packed = PackedCollator(0)([data])
    alone = Collator(0)(data)
    whole = {**packed, "position_ids": torch.arange(packed["input_ids"].shape[1])[None]}
    nll = [
        float(objective.measure(model, batch, training=True)["nll"].detach())
        for batch in (alone, packed, whole)
    ]
    assert nll[1] == pytest.approx(nll[0], rel=1e-5)
    assert nll[2] != pytest.approx(nll[0], rel=1e-3)


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2_moe", "jamba", "kimi_linear", "nemotron_h"])
def test_a_family_that_carries_a_state_over_the_border_is_refused_by_name(family):
    """Linear attention, convolution and state-space layers leak; the sentence says what to do."""
    with pytest.raises(UnsupportedModelError, match=rf"^{family}.*train without packing"):
        trained(tiny_model(family), packing=True)


def test_the_probe_sees_a_leak_through_attention():
    """gpt-oss makes its masks without positions: it leaks until it is given them."""
    model = tiny_model("gpt_oss")
    plain = Packing(PackedCollator(0))
    assert leaks(model, plain)
    assert not leaks(model, replace(plain, config=model.config))


def test_positions_begin_anew_and_padding_belongs_to_nobody():
    """Rows of 2+1 and 2 tokens, worked by hand; flat, both are one row without padding."""
    made = [Encoded([5, 6], [False, True]), Encoded([7], [False]), Encoded([8, 9], [False, True])]
    batch = PackedCollator(4)([made[:2], made[2:]])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 4]],
        "labels": [[IGNORED, 6, IGNORED], [IGNORED, 9, IGNORED]],
        "segment_ids": [[0, 0, 1], [0, 0, -1]],
        "position_ids": [[0, 1, 0], [0, 1, 0]],
    }
    flat = PackedCollator(4, flat=True)([made[:2], made[2:]])
    assert flat["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert flat["segment_ids"].tolist() == [[0, 0, 1, 2, 2]]
    assert flat["position_ids"].tolist() == [[0, 1, 0, 0, 1]]


@pytest.mark.parametrize("seed", range(20))
def test_every_example_is_packed_once_and_no_row_overflows(seed):
    """Random lengths; best-fit decreasing needs at most 11/9 of the fewest rows, and 1."""
    random_numbers = random.Random(seed)
    lengths = [random_numbers.randint(1, 32) for _ in range(100)]
    rows = pack(lengths, 32, random_numbers)
    assert sorted(index for row in rows for index in row) == list(range(100))
    assert all(sum(lengths[index] for index in row) <= 32 for row in rows)
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 32) + 1


def test_best_fit_takes_the_fullest_row_that_has_room():
    """7 6 | 3 4: into rows of 10 go 7+3 and 6+4; first-fit by arrival would need three rows."""
    rows = pack([6, 3, 7, 4], 10, random.Random(0))
    assert sorted(sorted(row) for row in rows) == [[0, 3], [1, 2]]


def test_packed_steps_are_counted_in_rows():
    """Twelve examples of 8 fill three rows of 32: two steps of two rows; then an epoch again."""
    chosen = FinetuneSettings(packing=True, max_length=32, batch_size=2)
    steps, rows = training_rows([8] * 12, chosen)
    assert steps == 2 and [len(row) for row in rows] == [4, 4, 4]
    steps, rows = training_rows([8] * 12, replace(chosen, steps=3))
    assert steps == 3 and len(rows) == 6
    assert sorted(i for row in rows[:3] for i in row) == list(range(12))
    assert {frozenset(row) for row in rows[:3]} != {frozenset(row) for row in rows[3:]}


def test_packed_training_lowers_the_loss_and_ends_plain():
    """From data to a plain model: the whole path, with examples of several lengths."""
    model = tiny_model("olmoe")
    names = set(model.state_dict())
    rows = trained(model, examples(12), packing=True, batch_size=2, steps=8)
    assert rows[-1]["total"] < rows[0]["total"]
    assert set(model.state_dict()) == names


def test_every_example_comes_once_before_any_comes_again():
    """Ten examples in batches of four, 25 places: two whole passes and half of one."""
    order = training_order([5, 1, 4, 2, 3] * 2, batch=4, seen=25, seed=1)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert len(order) == 25 and len(set(order[20:])) == 5


def test_batches_hold_like_lengths_and_come_in_random_order():
    """Sorted as a whole window the batches would ascend; shuffled they do not."""
    lengths = list(range(64))
    order = training_order(lengths, batch=4, seen=64, seed=0)
    batches = [order[at : at + 4] for at in range(0, 64, 4)]
    assert all(max(batch) - min(batch) == 3 for batch in batches)
    assert [min(batch) for batch in batches] != sorted(min(batch) for batch in batches)


def test_the_seed_decides_the_order():
    """The same seed gives the same order, another one another."""
    lengths = [5, 3, 8, 1, 9, 2, 7, 4]
    first = training_order(lengths, 2, 16, seed=0)
    assert first == training_order(lengths, 2, 16, seed=0)
    assert first != training_order(lengths, 2, 16, seed=1)


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"),
    [(7, 1.0, (7, 28)), (None, 1.0, (3, 10)), (None, 2.5, (7, 25)), (None, 0.01, (1, 1))],
)
def test_steps_come_from_the_epochs_unless_given(steps, epochs, expected):
    """Ten examples in batches of four."""
    assert number_of_steps(10, 4, steps=steps, epochs=epochs) == expected
