"""The order of training, by the seed alone, and the steps of a run."""

import pytest

from melinoe.finetune.rows import number_of_steps, training_order


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
