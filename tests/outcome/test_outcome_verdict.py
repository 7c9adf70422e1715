"""A card's first sentence follows from the measured change and its interval, and from no aim."""

import pytest

from melinoe.report.card import NO_CHANGE, verdict

SETTINGS = {"lambda_cache": 1.0, "steps": 200, "lambda_replay": 10.0}
ALIKE = {"lambda_cache": 0.0, "steps": 200, "lambda_replay": 10.0}
CONTROL = "its control, the same training without the locality terms"


def estimate(mean, low, high, n=20):
    return {"mean": mean, "low": low, "high": high, "n": n}


def change(ratio, ppl):
    """Transfers of the other over ours, at 8 slots, and the change in perplexity on maths."""
    moved = {"slots": [8] if ratio else [], "ratio": [ratio] if ratio else []}
    locality = {"transfers_per_token": {"lru": moved, "lfu": moved}}
    far = estimate(0.3, 0.2, 0.4)
    return {"perplexity": {"maths": ppl, "far": far}, "reading": locality, "writing": locality}


def outcome(ratio, ppl, theirs=ALIKE, control=True):
    """An outcome whose change from the base is ten times fewer, whatever that from the control."""
    inside = {"maths": {"in_domain": True}, "far": {"in_domain": False}}
    found = {"slots": 8, "num_experts": 32, "after": {"perplexity": inside}}
    if not control:
        return found | {"change": change(ratio, ppl)}
    return found | {
        "change": change(estimate(10.0, 9.0, 11.0), estimate(-0.9, -0.91, -0.89)),
        "control": {"perplexity": {}},
        "change_from_control": change(ratio, ppl),
        "control_run": {"name": "c", **({} if theirs is None else {"settings": theirs})},
    }


PRICE = estimate(0.022, 0.018, 0.027)


def test_fewer_transfers_are_said_with_their_price():
    """Ratio and perplexity with their intervals, against the control and nothing else."""
    assert verdict(outcome(estimate(3.0, 2.8, 3.2), PRICE), SETTINGS) == (
        f"Against {CONTROL}, this model needs **3.00 [2.80, 3.20] times fewer** transfers per "
        "token (8 of 32 experts per layer resident, LFU, reading the same held-out text); at a "
        "price of **+2.2 % [+1.8, +2.7]** in perplexity on held-out maths. Price out "
        "of domain, against the control: perplexity on held-out far **+30.0 % [+20.0, +40.0]**."
    )


@pytest.mark.parametrize(
    "ratio",
    [estimate(1.02, 0.98, 1.06), estimate(0.97, 0.93, 1.0), estimate(3.0, 3.0, 3.0, n=1)],
)
def test_an_interval_that_contains_1_or_one_prompt_shows_no_change(ratio):
    """Whatever the mean, and however many times fewer than the base."""
    said = verdict(outcome(ratio, PRICE), SETTINGS)
    assert said.startswith(f"{NO_CHANGE} against {CONTROL}: ")
    assert "times fewer" not in said


def test_more_transfers_are_said_to_be_more():
    """Three quarters of ours is what the control needs."""
    said = verdict(outcome(estimate(0.75, 0.7, 0.8), PRICE), SETTINGS)
    assert "needs **more** transfers" in said and "0.750 [0.700, 0.800]" in said


def test_a_model_that_loads_nothing_has_no_ratio():
    """There is nothing to divide by."""
    assert "needs **no transfers**" in verdict(outcome(None, PRICE), SETTINGS)


@pytest.mark.parametrize(
    ("ppl", "said"),
    [
        (
            estimate(0.001, -0.01, 0.01),
            "+0.1 % [\N{MINUS SIGN}1.0, +1.0], where the interval contains 0",
        ),
        (estimate(0.01, 0.01, 0.01, n=1), "on one text, which says nothing of the next"),
        (estimate(-0.02, -0.03, -0.01), "; perplexity on held-out maths **\N{MINUS SIGN}2.0 %"),
    ],
)
def test_a_price_that_was_not_shown_is_called_none(ppl, said):
    """An interval that contains 0, one text, or a perplexity that fell."""
    found = verdict(outcome(estimate(3.0, 2.8, 3.2), ppl), SETTINGS)
    assert said in found and "at a price" not in found


def test_without_a_control_nothing_is_the_locality_terms_doing():
    """Against the base alone: a change and no price, and what was not measured is said."""
    found = outcome(estimate(3.0, 2.8, 3.2), estimate(-0.9, -0.91, -0.89), control=False)
    said = verdict(found, SETTINGS)
    assert said.startswith("Against its base, this model needs **3.00")
    assert "price" not in said
    none = verdict(outcome(estimate(1.0, 0.9, 1.1), PRICE, control=False), SETTINGS)
    assert none.startswith(f"{NO_CHANGE} against its base: ")


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (ALIKE | {"lambda_replay": 0.0}, "not like for like (it differs in lambda\\_replay"),
        (None, "no record says how it was trained"),
    ],
)
def test_a_control_that_is_not_like_for_like_sets_no_price(theirs, said):
    """Neither in domain nor out of it: the difference may be the teacher's."""
    found = outcome(estimate(3.0, 2.8, 3.2), PRICE, theirs)
    first = verdict(found, SETTINGS)
    assert said in first
    assert "rice" not in first
    assert "Perplexity out of domain, against the control: perplexity on held-out far" in first
