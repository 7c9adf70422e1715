"""Studies of fine-tunings: intervals over seeds and items, like-for-like prices, tables."""

import math

import numpy as np
import pytest
from data_rows import write

from benchmarks.study.tables import (
    NO_CONTROL,
    crossed,
    fewer,
    frontier,
    gather,
    increase,
    main,
    study_tables,
    transfers,
)
from melinoe.report.table import DASH


def run(
    name,
    seed,
    nll,
    loads,
    *,
    family="clipped",
    strength=1.0,
    group="frontier",
    other=1.0,
    **settings,
):
    """One record of a study: three examples in domain, two elsewhere, two prompts of 10 tokens."""
    cache = 1.0 if group == "frontier" else 0.0
    return {
        "kind": "study",
        "group": group,
        "family": family,
        "strength": strength,
        "name": name,
        "seed": seed,
        "settings": {"seed": seed, "steps": 200, "lambda_cache": cache, **settings},
        "num_experts": 32,
        "quality": {
            "maths": {"in_domain": True, "nll": [nll, 2 * nll, 3 * nll], "tokens": [10, 20, 30]},
            "prose": {"in_domain": False, "nll": [other, other], "tokens": [10, 10]},
        },
        "transfers": {
            "lru-8": {"loads": [2 * loads, 2 * loads]},
            "lfu-8": {"loads": [loads, loads]},
        },
        "tokens": [10, 10],
        "experts_per_sequence": [8.0, 10.0],
        "distinct_experts": [16, 20],
    }


def records():
    """A base, a plain run and one setting, the last two with seeds 0 and 1."""
    base = run("base", 0, 40.0, 60, family="base", strength=None, group="base")
    plain = [
        run("plain", seed, 20.0, 50, family="plain", strength=None, group="plain")
        for seed in (0, 1)
    ]
    tried = [run("clipped 1", 0, 21.0, 20, other=1.5), run("clipped 1", 1, 22.0, 10, other=1.5)]
    return [base, *plain, *tried]


def price_of(study, name, in_domain=True):
    """Price of a setting over its like-for-like control."""
    setting = study.settings[name]
    return increase(setting, study.control(setting), in_domain)


def test_the_price_is_paired_with_the_control_of_the_same_seed():
    """Gaps of .1 and .2 nats per token and seed: exp of their mean is the price."""
    study = gather(records())
    price = price_of(study, "clipped 1")
    assert price.mean == pytest.approx(math.expm1(0.15))
    # Every example of a seed has the same gap, so only the seeds move the interval: two of them,
    # .0707 apart from their mean, so an error of .05, and 12.71 of it with one degree of freedom.
    assert math.log1p(price.low) == pytest.approx(0.15 - 0.635, rel=0.2)
    assert math.log1p(price.high) == pytest.approx(0.15 + 0.635, rel=0.2)
    other = price_of(study, "clipped 1", False)
    assert other.mean == pytest.approx(math.expm1(0.05))


def test_a_run_without_its_control_has_no_price():
    """A seed that the control lacks is left out; a setting left with none has no price."""
    rows = [row for row in records() if (row["name"], row["seed"]) != ("plain", 1)]
    study = gather(rows)
    assert price_of(study, "clipped 1").mean == pytest.approx(math.expm1(0.1))
    rows = [row for row in rows if row["name"] != "plain"]
    study = gather(rows)
    assert price_of(study, "clipped 1") is None
    assert study_tables(study) == []


TAUGHT = {"group": "frontier", "lambda_match": 10.0}


def test_a_taught_run_is_priced_against_a_taught_run_alone():
    """
    Plain fine-tuning has no teacher, so it is no control of a run that has one.

    The taught run loses 1.9 nats a token, plain fine-tuning 2.0 and the control 1.8: its price is
    exp(.1) - 1, and what it gains over plain fine-tuning is the teacher's.
    """
    taught = [run("taught 1", seed, 19.0, 20, family="taught", **TAUGHT) for seed in (0, 1)]
    study = gather([*records(), *taught])
    assert study.control(study.settings["taught 1"]) is None
    assert increase(study.settings["taught 1"], study.settings["plain"], True).mean < 0
    (price,) = study_tables(study)
    row = dict(zip(price.columns, price.rows[-1], strict=True))
    assert row["price in domain"].text == row["price out of domain"].text == NO_CONTROL
    assert row["over plain fine-tuning, in domain"].text.endswith("9.5 %")
    assert any(note.startswith(NO_CONTROL) for note in price.notes)

    alone = [
        run("taught alone", seed, 18.0, 50, strength=None, lambda_cache=0.0, **TAUGHT)
        for seed in (0, 1)
    ]
    study = gather([*records(), *taught, *alone])
    assert study.control(study.settings["taught 1"]).name == "taught alone"
    assert price_of(study, "taught 1").mean == pytest.approx(math.expm1(0.1))
    assert price_of(study, "clipped 1").mean == pytest.approx(math.expm1(0.15))
    assert study.control(study.settings["taught alone"]) is None


def test_one_seed_that_was_trained_otherwise_makes_no_control():
    """Seed 1 took more steps than the plain run with that seed."""
    rows = records()
    rows[-1]["settings"]["steps"] = 400
    study = gather(rows)
    assert study.control(study.settings["clipped 1"]) is None


def test_a_group_without_a_control_has_no_frontier():
    """There is no price to draw; the table says so."""
    rows = [row for row in records() if row["name"] != "clipped 1"]
    taught = [run("taught 1", seed, 19.0, 20, **TAUGHT) for seed in (0, 1)]
    study = gather([*rows, *taught])
    assert frontier(study, "frontier") is None
    assert [table.name for table in study_tables(study)] == ["study-frontier"]


def test_transfers_are_summed_over_seeds_and_prompts():
    """20 and 10 loads a prompt of 10 tokens: 1.5 a token, 4 times fewer than the base's 6."""
    study = gather(records())
    assert transfers(study.settings["clipped 1"], "lfu-8").mean == pytest.approx(1.5)
    times = fewer(study, study.settings["clipped 1"], "lfu-8")
    assert times.mean == pytest.approx(4.0)
    # Seeds differ by a factor of 2: an error of log(2) / 2 in logarithms, and 12.71 of it.
    assert math.log(times.high / 4.0) == pytest.approx(12.71 * math.log(2) / 2, rel=0.2)
    assert math.log(times.low / 4.0) == pytest.approx(-12.71 * math.log(2) / 2, rel=0.2)


def test_the_interval_covers_seeds_and_items():
    """
    By hand, for values 0, 1, 2, 3: of items a bootstrap, of seeds a t interval.

    The mean of four items drawn anew lies in [.5, 2.5] in all but a few percent of cases. Four
    seeds have a standard deviation of 1.291, so their mean an error of .6455, and Student's t with
    3 degrees of freedom has 95 % within 3.182 of them: 1.5 +- 2.054. With both it is wider still.
    """
    by_item = np.tile(np.arange(4.0), (4, 1))
    ones = np.ones((4, 4))

    def mean(sums):
        return sums[0][0] / sums[0][1]

    item = crossed([(by_item, ones)], mean)
    seed = crossed([(by_item.T, ones)], mean)
    both = crossed([(by_item + by_item.T, ones)], mean)
    assert item.mean == seed.mean == 1.5
    assert both.mean == 3.0
    assert 0.25 <= item.low <= 0.75 and 2.25 <= item.high <= 2.75
    assert seed.low == pytest.approx(-0.554, abs=0.12)
    assert seed.high == pytest.approx(3.554, abs=0.12)
    assert both.high - both.low > 1.02 * (seed.high - seed.low)
    one = crossed([(by_item[:1], ones[:1])], mean)
    assert 0.25 <= one.low <= 0.75 and 2.25 <= one.high <= 2.75


def test_parts_with_other_seeds_are_refused():
    """Two corpora measured with different numbers of seeds cannot be resampled together."""
    with pytest.raises(ValueError, match="same seeds"):
        crossed([(np.ones((2, 3)),), (np.ones((3, 3)),)], lambda sums: sums[0][0])


def test_the_table_names_base_and_plain_runs_first():
    """Base and plain runs stand above, without a price, and the notes name the cache."""
    (price,) = study_tables(gather(records()))
    assert [row[0].text for row in price.rows] == ["base", "plain", "clipped 1"]
    # Four and two nats a token.
    assert price.columns[2] == "perplexity, maths"
    assert [row[2].text for row in price.rows[:2]] == ["54.6", "7.39"]
    assert price.rows[1][3].text == DASH
    assert price.rows[2][3].text.startswith("+16.2 %")
    assert price.rows[2][5].text == "1.50"
    assert "LFU, 25 %" in price.notes[-1]


def test_the_frontier_names_who_is_not_beaten():
    """Of two settings, the one that costs more and saves less is not named as unbeaten."""
    worse = [run("literal 1", seed, 23.0, 40, family="literal", strength=1.0) for seed in (0, 1)]
    figure = frontier(gather([*records(), *worse]))
    assert [panel.count("<svg") for panel in figure.panels] == [1, 1]
    unbeaten = figure.caption.partition("cheapest first: ")[2]
    assert "clipped 1" in unbeaten
    assert "literal 1" not in unbeaten


def test_the_page_is_written_and_checked(monkeypatch, capsys, tmp_path):
    """Tables between the markers; `--check` passes, and names the one that somebody changed."""
    write(tmp_path / "study.jsonl", *records())
    page = tmp_path / "study.md"
    page.write_text("# Study\n<!-- report:study-frontier --><!-- /report:study-frontier -->\n")
    monkeypatch.setattr("benchmarks.study.tables.RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.study.tables.PAGE", page)
    monkeypatch.setattr("sys.argv", ["tables.py"])
    main()
    assert "| clipped 1 | 2 |" in page.read_text()
    monkeypatch.setattr("sys.argv", ["tables.py", "--check"])
    main()
    assert "up to date" in capsys.readouterr().err
    page.write_text(page.read_text().replace("| clipped 1 | 2 |", "| clipped 1 | 3 |"))
    with pytest.raises(SystemExit, match="out of date in study-frontier"):
        main()
    assert "| clipped 1 | 3 |" in page.read_text()
