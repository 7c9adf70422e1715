"""
NaN and infinity in a checkpoint: one sentence that names the layer and the tensor, everywhere.

`generate` ended with an empty text and exit 0, sampling with a traceback, fine-tuning with a
ValueError of the JSON writer, its files left behind.
"""

import logging
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import damaged
import pytest
import tiny
import torch
from data_rows import write
from fast_attach import attach as fast_attach
from safetensors.torch import load_file, save_file
from small_olmoe import words_tokenizer

from melinoe import attach
from melinoe.config import FinetuneSettings
from melinoe.data import Encoded, Example
from melinoe.errors import DataError, ModelError, TrainingError
from melinoe.evaluate import decoded_perplexity, perplexity
from melinoe.finetune import finetune
from melinoe.generate import generate
from melinoe.moe.finite import are_finite, broken_weight
from melinoe.predictor.fit import fit_shares
from melinoe.predictor.model import features_of

NAN, INF = float("nan"), float("inf")
ROWS = [{"prompt": "w3 w4", "completion": " w5 w6 w7"}] * 6
# Tensor of the checkpoint, what is planted, and what the sentence names.
FAULTS = {
    "router": (
        "model.layers.1.mlp.gate.weight", NAN, r"model\.layers\.1\.mlp\.gate\.weight holds NaN"
    ),
    "expert": (
        "model.layers.0.mlp.experts.{}.down_proj.weight", NAN,
        r"expert \d of model\.layers\.0\.mlp\.experts holds NaN in its down_proj",
    ),
    "attention": (
        "model.layers.1.self_attn.q_proj.weight", INF,
        r"layers\.1\.self_attn\.q_proj\.weight holds inf",
    ),
    # As a mask is written, but no weight of a product is one.
    "minus infinity": (
        "model.layers.0.self_attn.o_proj.weight", -INF,
        r"layers\.0\.self_attn\.o_proj\.weight holds inf",
    ),
    "expert's minus infinity": (
        "model.layers.0.mlp.experts.{}.up_proj.weight", -INF,
        r"expert \d of model\.layers\.0\.mlp\.experts holds infinity in its gate_up_proj",
    ),
    # Of a prompt of one token attention makes numbers of it again.
    "queries": (
        "model.layers.0.self_attn.q_proj.weight", NAN,
        r"layers\.0\.self_attn\.q_proj\.weight holds NaN",
    ),
    "embedding": ("model.embed_tokens.weight", NAN, r"embed_tokens\.weight holds NaN"),
    "head": ("lm_head.weight", NAN, r"lm_head\.weight holds NaN"),
}  # fmt: skip


def plant(base, fault):
    """Put NaN or infinity into all of a tensor, of every expert where it is an expert's."""
    name, value, _ = FAULTS[fault]
    for shard in sorted(base.glob("*.safetensors")):
        tensors = load_file(shard)
        for number in range(8):
            if name.format(number) in tensors:
                tensors[name.format(number)][..., :1] = value
        save_file(tensors, shard, metadata={"format": "pt"})
    return base


@pytest.fixture
def base(tmp_path):
    made = damaged.write_olmoe(tmp_path / "base")
    words_tokenizer().save_pretrained(made)
    return made


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    write(path, *ROWS)
    return path


COMMANDS = {
    "generate": ["generate", "{base}", "w3", "--slots", "4"],
    "sampling": ["generate", "{base}", "w3 w4", "--slots", "4",
                 "--temperature", "1"],
    "trace": ["trace", "{base}", "--data", "{data}", "--out", "{out}"],
    "bench": ["bench", "{base}", "--data", "{data}", "--slots", "4"],
    "evaluate": ["evaluate", "{base}", "--data", "{data}"],
    "finetune": ["finetune", "{base}", "--data", "{data}", "--out", "{out}", "--epochs", "1"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "fault"),
    [(c, "router") for c in COMMANDS] + [("generate", f) for f in FAULTS if f != "router"],
)
def test_commands_name_the_tensor_and_leave_nothing(command, fault, base, data, tmp_path, melinoe):
    """Exit 1 and one line on stderr."""
    plant(base, fault)
    out = tmp_path / "out"
    arguments = [part.format(base=base, data=data, out=out) for part in COMMANDS[command]]
    before = {path.name for path in tmp_path.iterdir()}
    code, _, said = melinoe(*arguments)
    lines = said.strip().splitlines()
    assert code == 1, lines
    assert len([line for line in lines if "holds" in line]) == 1 and "Traceback" not in lines
    assert re.search(FAULTS[fault][2], lines[-1]), lines
    assert {path.name for path in tmp_path.iterdir()} == before


PLAIN = FinetuneSettings(capacity=0.5, steps=2, batch_size=1, lora_rank=2, lambda_replay=0.0)


@pytest.mark.parametrize("change", [{}, {"steps": 1}, {"lambda_replay": 1.0}])
def test_fine_tuning_stops_at_once_and_leaves_nothing(base, tmp_path, change):
    """Without measuring, too: at its first step, or as the model writes its own anchor text."""
    plant(base, "router")
    settings = replace(PLAIN, **change)
    with pytest.raises((TrainingError, ModelError), match=FAULTS["router"][2]):
        finetune(base, [Example("w3 w4", " w5 w6 w7", "here")] * 3, tmp_path / "out", settings)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def text(*ids):
    return Encoded(list(ids), [False, *[True] * (len(ids) - 1)])


@pytest.mark.parametrize("engine", ["plain", "reference", "fast"])
def test_every_engine_and_measure_names_the_expert(engine):
    """One expert's one number, of those that the text uses."""
    model = tiny.tiny_model("olmoe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[:, 3, 2] = INF
    handle = None
    if engine != "plain":
        handle = (fast_attach if engine == "fast" else attach)(model, slots=4)
    words = r"layers\.1\.mlp\.experts"
    one = text(5, 6, 7, 8)
    with pytest.raises(ModelError, match=rf"loss of example 0 is not finite.*{words}"):
        perplexity(model, [one])
    with pytest.raises(ModelError, match=words):
        decoded_perplexity(model, handle, [one])
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2, decode=lambda *_, **__: "")
    for sampling in ({}, {"do_sample": True}):
        with pytest.raises(ModelError, match=rf"what the model says is not finite.*{words}"):
            generate(model, handle, tokenizer, [5, 6, 7], 4, **sampling)
    if handle is not None:
        handle.audit()


@pytest.mark.parametrize("engine", ["plain", "reference", "fast"])
def test_a_text_after_a_broken_one_is_what_it_was_before(engine):
    """One token's embedding is NaN; the same handle then writes a text without it."""
    model = tiny.tiny_model("olmoe")
    handle = None
    if engine != "plain":
        handle = (fast_attach if engine == "fast" else attach)(model, slots=4)
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2, decode=lambda *_, **__: "")
    expected = generate(model, handle, tokenizer, [5, 6, 7], 6).ids
    broken = next(token for token in range(8, tiny.VOCAB) if token not in expected)
    with torch.no_grad():
        model.model.embed_tokens.weight[broken] = NAN
    for sampling in ({}, {"do_sample": True}):
        with pytest.raises(ModelError, match="not finite"):
            generate(model, handle, tokenizer, [5, broken, 7], 6, **sampling)
        assert generate(model, handle, tokenizer, [5, 6, 7], 6).ids == expected
    if handle is not None:
        handle.audit()


def test_numbers_that_grow_beyond_float16_are_told_from_broken_ones():
    """All weights are numbers, and the way out is another type."""
    model = tiny.tiny_model("olmoe", dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.fill_(60000.0)
    assert broken_weight(model) is None
    with attach(model, slots=4), pytest.raises(ModelError, match=r"layers\.0.*float32"):
        perplexity(model, [text(5, 6, 7, 8)])


def test_masked_tokens_are_no_fault():
    """Minus infinity for some tokens, as for padding of the vocabulary; for all it is one."""
    assert are_finite(torch.tensor([[1.0, -INF, -3.0]]))
    assert not are_finite(torch.tensor([[1.0, NAN, -3.0]]))
    assert not are_finite(torch.tensor([[1.0, INF, -3.0]]))
    assert not are_finite(torch.tensor([[1.0, 2.0], [-INF, -INF]]))
    model = tiny.tiny_model("olmoe")
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    top = expected[0, 3:].tolist()
    masked = next(i for i in range(3, tiny.VOCAB) if i not in top)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(tiny.VOCAB))
    model.lm_head.bias.data[masked] = -INF
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2, decode=lambda *_, **__: "")
    with attach(model, slots=4) as handle:
        assert generate(model, handle, tokenizer, [5, 6, 7], 4).ids == top


def test_a_predictor_is_not_fitted_to_what_is_no_number():
    """Neither by the model's embeddings nor by features that are given."""
    embeddings = torch.randn(20, 4)
    embeddings[7, 1] = NAN
    with pytest.raises(ModelError, match="embedding of id 7"):
        features_of(embeddings, [[3, 4], [5, 7]])
    assert features_of(embeddings, [[3, 4]]).isfinite().all()
    target = torch.rand(40, 2, 8).double().numpy()
    features = torch.randn(40, 8)
    features[3, 2] = INF
    prompts = [[n % 7, 3] for n in range(40)]
    with pytest.raises(DataError, match="no numbers"):
        fit_shares(target, prompts, embeddings, 2, "x", features=features)


def test_a_run_whose_every_step_is_bad_learned_nothing(base, tmp_path, monkeypatch, caplog):
    """The weights are numbers, the losses are not: it says so instead of writing a checkpoint."""
    import melinoe.finetune.trainer as trainer

    real = trainer.Objective.weigh

    def weigh(*args, **kwargs):
        terms = real(*args, **kwargs)
        return replace(terms, total=terms.total * math.nan)

    monkeypatch.setattr(trainer.Objective, "weigh", weigh)
    settings = PLAIN
    with caplog.at_level(logging.ERROR), pytest.raises(TrainingError, match="nothing was learned"):
        finetune(base, [Example("w3 w4", " w5 w6 w7", "here")] * 3, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
