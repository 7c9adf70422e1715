"""A control that was trained already: what it must share with the run that asks for it."""

import pytest
from small_runs import settings

from melinoe.data import Example, load_examples
from melinoe.errors import TrainingError
from melinoe.finetune.run import train_control


def test_a_control_of_another_run_is_not_resumed_from(checkpoint):
    """Its settings are those asked for, but its data or replayed text is another."""
    data, base = load_examples(checkpoint / "data.jsonl"), checkpoint / "base"
    now = settings(steps=1, lambda_replay=0.1)

    def control(data=data, word="she"):
        anchor = [Example("what? ", f"{word} was it.", "anchor")] if word else None
        return train_control(
            base, data, checkpoint / "out", now, resume=True, anchor_examples=anchor
        )

    out = control()
    before = (out / "melinoe.json").read_bytes()
    assert control() == out
    for given, fault in (
        ({"data": data[:2]}, "another data"),
        ({"word": "he"}, "another anchor text"),
        ({"word": None}, "another anchor text"),  # the base's own
    ):
        with pytest.raises(TrainingError, match=fault):
            control(**given)
    assert (out / "melinoe.json").read_bytes() == before
