"""A run that changed nothing gets a card that says so, whatever it was trained for."""

from functools import partial

from data_rows import write
from small_olmoe import write_checkpoint

from melinoe.checkpoint import read_metadata, write_metadata
from melinoe.config import OutcomeSettings
from melinoe.report.card import write_card

STEPS = ("--steps", 2, "--batch-size", 4, "--lora-rank", 2)
NOTHING = ("--learning-rate", 1e-9, "--lora-learning-rate", 1e-9)


def test_two_steps_at_a_rate_of_nothing_show_no_change(tmp_path, monkeypatch, melinoe):
    """With a control, and from the same record without one: no saving is claimed of any model."""
    little = partial(OutcomeSettings, prompts=3, max_new_tokens=4)
    monkeypatch.setattr("melinoe.outcome.record.OutcomeSettings", little)
    monkeypatch.setattr("melinoe.report.card.figures_of", lambda records: [])
    write_checkpoint(tmp_path / "base")
    rows = [{"prompt": f"w{2 + i} ", "completion": f"w{9 + i} w4 w{3 + i}"} for i in range(16)]
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    write(data, *rows)
    common = (tmp_path / "base", "--data", data, "--eval-data", data, "--out", out)
    assert melinoe("finetune", *common, *STEPS, *NOTHING, "--against", "control")[0] == 0

    def card(other):
        text = write_card(out)[0].read_text()
        assert f"**No change shown** against {other}" in text
        assert "times fewer" not in text and "few experts" not in text

    card("its control, the same training without the locality terms")
    metadata = read_metadata(out)
    for key in ("control", "change_from_control", "control_run"):
        del metadata["outcome"][key]
    write_metadata(out, metadata)
    card("its base")
