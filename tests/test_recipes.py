"""The recipes run from nothing but text, at a size for tests."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from melinoe.cache.trace import Trace

RECIPES = Path(__file__).parents[1] / "recipes"


def module_of(name):
    """A recipe as a module."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe(monkeypatch):
    """`tiny_olmoe.py`, on a clock of which a test can turn the hands."""
    module = module_of("tiny_olmoe")
    module.ahead_s = 0
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + module.ahead_s)
    monkeypatch.setattr(module, "time", clock)
    return module


def run(recipe, monkeypatch, out: Path) -> None:
    """Four steps of two sequences of sixteen tokens."""
    data = out.with_name("data")
    data.mkdir(exist_ok=True)
    lines = [json.dumps({"text": f"word {n} and word {n + 1} make a line"}) for n in range(60)]
    (data / "words.jsonl").write_text("\n".join(lines))
    arguments = {
        "data": data, "out": out, "tokens": 128, "vocab-size": 300, "layers": 1, "experts": 4,
        "top-k": 2, "hidden-size": 16, "intermediate-size": 8, "heads": 2, "context": 16,
        "batch": 2,
    }  # fmt: skip
    argv = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["tiny_olmoe.py", *argv])
    recipe.main()


def test_the_seconds_of_a_run_that_was_resumed_are_those_of_all_its_parts(
    recipe, monkeypatch, tmp_path
):
    """Stopped in the third of four steps, each of 1,000 s: two are kept, two follow at once."""
    out = tmp_path / "out"
    real, steps = recipe.PretrainTrainer.training_step, []

    def slow(self, *arguments, **options):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        recipe.ahead_s += 1000
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(recipe.PretrainTrainer, "training_step", slow)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, monkeypatch, out)
    assert not (out / "training.json").exists()
    run(recipe, monkeypatch, out)
    record = json.loads((out / "training.json").read_text())
    assert 2000 <= record["seconds"] < 2200
    assert record["steps"] == 4
    check_plain_olmoe(out)


def check_plain_olmoe(out):
    """What other engines read: weights not normalised, a head of its own, text cut as SmolLM's."""
    config = AutoConfig.from_pretrained(out)
    assert not config.norm_topk_prob and not config.tie_word_embeddings
    assert not config.output_router_logits and config.router_aux_loss_coef == 0.01
    cut = json.loads((out / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    assert [one["type"] for one in cut] == ["Digits", "ByteLevel"]
    assert cut[0]["individual_digits"] and cut[1]["use_regex"] and not cut[1]["add_prefix_space"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    chat = [("system", "Be short."), ("user", "1 + 1?"), ("assistant", "2"), ("user", "2 + 2?")]
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": said} for role, said in chat],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == (
        "Be short.\n\nQuestion: 1 + 1?\nAnswer: 2<|endoftext|>Question: 2 + 2?\nAnswer:"
    )


def test_layers_that_each_keep_to_one_expert_are_even_over_the_model_alone(recipe):
    """Two experts, top-1: the first layer uses one, the second the other."""
    one = torch.tensor([[20.0, -20.0]] * 3)
    config = SimpleNamespace(num_experts=2, num_experts_per_tok=1)
    logits = (one, one.flip(-1))
    assert float(recipe.balance_loss(logits, config, "model")) == pytest.approx(1)
    assert float(recipe.balance_loss(logits, config, "layer")) == pytest.approx(2)


def test_the_five_figures_of_routing_worked_by_hand():
    """Four experts, top-1, 63 tokens: one text uses 0 alone, the other 1 and 2 in turn.

    Uses: 63, 32, 31. One slot misses once in the first text and always in the second, whoever
    decides; two slots miss once and twice. What follows the 63rd token, and prompts, do not count.
    """
    routing = module_of("routing")
    texts = [[3] + [0] * 70, [3] + [1, 2] * 35]
    trace = Trace(
        experts=np.array(texts, np.int16).reshape(-1, 1, 1),
        forward=np.arange(142, dtype=np.int32),
        sequence=np.repeat(np.arange(2, dtype=np.int32), 71),
        kind=np.tile(np.array([0] + [1] * 70, np.uint8), 2),
        num_experts=4,
    )
    share = np.array([63, 32, 31]) / 126
    assert routing.figures(trace) == pytest.approx(
        {
            "texts": 2,
            "entropy": -(share * np.log(share)).sum() / np.log(4),
            "used": 1.5 / 4,
            "lfu": 100 * 64 / 126,
            "static": 100 * 64 / 126,
            "lfu at half": 100 * 3 / 126,
            "lfu / belady": 1.0,
        }
    )
