"""Experts are dropped by their use, and the price is measured on other examples."""

import math

import pytest
import torch
from small_olmoe import tiny_model, words_tokenizer
from transformers import AutoModelForCausalLM

from melinoe.data import Example, encode
from melinoe.errors import DataError, MelinoeError
from melinoe.evaluate import perplexity
from melinoe.outcome import prune_by_use

MEMORY = {"device": "cpu"}


@pytest.fixture
def base(tmp_path):
    """A random model of eight experts, top-2."""
    tiny_model().save_pretrained(tmp_path / "base")
    words_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def examples(count=8):
    """Texts of different words."""
    return [
        Example("", " ".join(f"w{(7 * n + i) % 30 + 2}" for i in range(12)), f"row {n}")
        for n in range(count)
    ]


def losses(path):
    """Transformers' own loss of the second half of the examples, text by text."""
    model = AutoModelForCausalLM.from_pretrained(path)
    return perplexity(model, encode(examples()[4:], words_tokenizer(), 512))


def test_the_least_used_go_and_the_price_is_that_of_the_written_checkpoint(base, tmp_path):
    """Six of eight stay; the increase is transformers' loss of the judging half over the base's."""
    found = prune_by_use(str(base), examples(), tmp_path / "out", keep=6, memory=MEMORY)
    tuned, plain = losses(tmp_path / "out"), losses(base)
    more = (tuned.nll - plain.nll).sum() / plain.tokens.sum()
    assert (found.before, found.kept) == (8, 6)
    whole, pruned = (AutoModelForCausalLM.from_pretrained(one) for one in (base, tmp_path / "out"))
    uses = torch.zeros(2, 8)
    for one in encode(examples()[:4], words_tokenizer(), 512):
        ids = torch.tensor([one.input_ids])
        logits = whole(input_ids=ids, output_router_logits=True).router_logits
        for layer, chosen in enumerate(x.topk(2).indices.flatten() for x in logits):
            uses[layer] += torch.bincount(chosen, minlength=8)
    for layer, counts in enumerate(uses):
        stay = counts.sort(descending=True, stable=True).indices[:6].sort().values
        ours, theirs = (m.model.layers[layer].mlp.gate.weight for m in (pruned, whole))
        assert torch.equal(ours, theirs[stay])
    assert found.increase.mean == pytest.approx(math.expm1(more), abs=1e-5)


def test_the_fewest_experts_within_a_price_are_found(base, tmp_path):
    """What they cost is within it, and one fewer is told to cost more."""
    said = []
    found = prune_by_use(
        str(base), examples(), tmp_path / "out", max_increase=0.0005, memory=MEMORY, say=said.append
    )
    tried = {int(one.split()[0]): float(one.split()[-2]) / 100 for one in said}
    assert found.increase.mean <= 0.0005
    assert found.kept == 2 or tried[found.kept - 1] > 0.0005
    assert not list(tmp_path.glob("tmp*"))


def test_a_price_that_nothing_smaller_meets_is_told(base, tmp_path):
    """Nothing is written."""
    with pytest.raises(MelinoeError, match="without any expert of its 8 the model is more than"):
        prune_by_use(str(base), examples(), tmp_path / "out", max_increase=-0.9, memory=MEMORY)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [{}, {"keep": 4, "max_increase": 0.1}])
def test_one_of_number_and_price_is_asked_for(base, tmp_path, given):
    """Neither, or both."""
    with pytest.raises(MelinoeError, match="one of the two"):
        prune_by_use(str(base), examples(), tmp_path / "out", memory=MEMORY, **given)


def test_as_many_as_there_are_is_no_pruning(base, tmp_path):
    """The sentence says how many there are."""
    with pytest.raises(MelinoeError, match="has 8 experts in each layer; keep fewer"):
        prune_by_use(str(base), examples(), tmp_path / "out", keep=8, memory=MEMORY)


def test_one_example_cannot_count_and_judge(base, tmp_path):
    """Half of it is none."""
    with pytest.raises(DataError, match="at least two"):
        prune_by_use(str(base), examples(1), tmp_path / "out", keep=4, memory=MEMORY)
