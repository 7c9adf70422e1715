"""Before and after fine-tuning: paired numbers against independent counts, and their card."""

import hashlib
import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from small_olmoe import EXPERTS, LAYERS, TOP_K, tiny_model, words_tokenizer

from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW
from melinoe.checkpoint import read_metadata, write_metadata
from melinoe.config import OutcomeSettings
from melinoe.data import Encoded, Example, encode
from melinoe.errors import CheckpointError, DataError, OutputExistsError, WriteError
from melinoe.evaluate import perplexity
from melinoe.measure import reading_trace
from melinoe.outcome import measure_outcome, record_origin, record_outcome
from melinoe.outcome.record import around, cache_sizes
from melinoe.report.card import write_card
from melinoe.runtime.attach import attach

SETTINGS = OutcomeSettings(prompts=5, max_new_tokens=6, max_length=32, batch_size=4)


def texts(first=2, count=8):
    """One word to start from, so that no request needs more experts than two slots hold."""
    return [
        Example(f"w{first + i}", f"w{9 + i} w4 w{3 + i} w{20 - i}", f"x:{i}") for i in range(count)
    ]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A base and another random model that stands for the fine-tuned one."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("tuned", 5)):
        tiny_model(seed).save_pretrained(root / name)
        words_tokenizer().save_pretrained(root / name)
    (root / "base" / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    log = [
        {"step": 0, "eval_nll": 3.4, "eval_cache": 1.5},
        {"step": 1, "nll": 3.5, "cache": 1.6},
        {"step": 10, "nll": 2.9, "cache": 0.9},
        {"step": 10, "eval_nll": 3.0, "eval_cache": 1.0},
    ]
    write_metadata(
        root / "tuned", {"settings": {"capacity": 0.25, "lambda_cache": 0.5}, "log": log}
    )
    return root


@pytest.fixture(scope="module")
def tuned(checkpoints):
    """The tuned model with its origin and outcome recorded."""
    data = checkpoints / "train.jsonl"
    data.write_text('{"text": "w3 w4"}\n')
    path = checkpoints / "tuned"
    record_origin(path, checkpoints / "base", data, texts(count=1))
    record_outcome(path, checkpoints / "base", {"words": texts()}, {"far": texts(20, 4)},
                   settings=SETTINGS)  # fmt: skip
    return path


def test_reading_gives_what_decoding_the_same_text_chooses():
    """Token by token with a key-value cache, on the same ids: equal experts in every row.

    So do weights, and what the next router said of every decoded token and of no other.
    """
    model = tiny_model()
    encoded = [
        Encoded([3, 4, 5, 6, 7], [False, False, True, True, True]),
        Encoded([8, 9], [False, True]),
    ]
    handle = attach(model, slots=EXPERTS)
    trace = reading_trace(model, handle, encoded, scores=True, guesses=True)
    with handle.record(scores=True, guesses=True) as recorder, torch.no_grad():
        for one in encoded:
            start = one.completion_mask.index(True)
            ids = torch.tensor([one.input_ids])
            past = model(input_ids=ids[:, :start], use_cache=True).past_key_values
            for at in range(start, len(one)):
                model(input_ids=ids[:, at : at + 1], past_key_values=past, use_cache=True)
    decoded = recorder.trace()
    handle.detach()
    assert np.array_equal(np.sort(trace.experts), np.sort(decoded.experts))
    assert np.array_equal(np.sort(trace.guesses), np.sort(decoded.guesses))
    assert (trace.guesses[3:5, 1:] >= 0).all() and (trace.guesses[:2] == -1).all()
    assert np.allclose(np.sort(trace.scores), np.sort(decoded.scores), atol=2e-3)
    assert trace.forward.tolist() == decoded.forward.tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert trace.sequence.tolist() == [0, 0, 0, 0, 0, 1, 1]
    kinds = [PROMPT_ROW, PROMPT_ROW, *[COMPLETION_ROW] * 3, PROMPT_ROW, COMPLETION_ROW]
    assert trace.kind.tolist() == kinds


def test_a_prompt_after_a_completion_is_a_pass_of_its_own():
    """A chat's second question is computed at once, apart from what was written before it."""
    model = tiny_model()
    handle = attach(model, slots=EXPERTS)
    mask = [False, True, True, False, False, True]
    trace = reading_trace(model, handle, [Encoded([3, 4, 5, 6, 7, 8], mask)])
    assert trace.forward.tolist() == [0, 1, 2, 3, 3, 4]
    with pytest.raises(DataError):
        reading_trace(model, handle, [])


def test_sizes_include_half_and_double_of_what_was_trained_for():
    """Of 64 experts, 16 slots: steps of four, and 8 and 32 among them; never none, never more."""
    assert around(16, 64) == [8, 16, 32]
    assert around(1, 8) == [1, 2] and around(6, 8) == [3, 6, 8]
    sizes = cache_sizes(17, 64)
    assert {8, 17, 34, 64} <= set(sizes) and sizes == sorted(set(sizes)) and sizes[0] == 4


def test_an_outcome_holds_what_independent_measurements_give(tuned, checkpoints):
    """Perplexity from `perplexity`, loads counted here, token by token."""
    outcome = read_metadata(tuned)["outcome"]
    assert (outcome["slots"], outcome["num_experts"]) == (2, EXPERTS)
    assert (outcome["layers"], outcome["top_k"], outcome["prompts"]) == (LAYERS, TOP_K, 5)
    encoded = encode(texts(), words_tokenizer(), 32)
    loads, tokens = {}, {}
    for side, seed in (("before", 0), ("after", 5)):
        model = tiny_model(seed)
        found = outcome[side]["perplexity"]["words"]
        assert found["in_domain"] and not outcome[side]["perplexity"]["far"]["in_domain"]
        assert found["perplexity"]["mean"] == pytest.approx(
            perplexity(model, encoded, 4).estimate.mean
        )
        handle = attach(model, slots=EXPERTS)
        trace = reading_trace(model, handle, encoded[:5])
        handle.detach()
        loads[side], tokens[side] = loads_of_two_slots(trace)
        cache = outcome[side]["reading"]["caches"]["lru"]
        at = cache["slots"].index(2)
        expected = sum(loads[side]) / sum(tokens[side])
        assert cache["transfers_per_token"][at]["mean"] == pytest.approx(expected)
    change = outcome["change"]["reading"]["transfers_per_token"]["lru"]
    ratio = change["ratio"][change["slots"].index(2)]
    assert ratio["mean"] == pytest.approx(sum(loads["before"]) / sum(loads["after"]))
    assert ratio["low"] <= ratio["mean"] <= ratio["high"] and ratio["n"] == 5


def loads_of_two_slots(trace):
    """
    Loads and tokens of each sequence's completion.

    With as many slots as a token has experts, the cache holds those of the token before.
    """
    loads, tokens = [], []
    for sequence in range(trace.num_sequences):
        rows = np.flatnonzero(trace.sequence == sequence)
        pairs = list(pairwise(rows))
        loads.append(
            sum(
                len(set(trace.experts[two, layer]) - set(trace.experts[one, layer]))
                for one, two in pairs
                for layer in range(LAYERS)
            )
        )
        tokens.append(len(pairs))
    return loads, tokens


def test_a_model_against_itself_has_not_changed(checkpoints):
    """No difference, to the bit, in anything; every ratio 1."""
    base = checkpoints / "base"
    change = measure_outcome(base, base, {"words": texts()}, settings=SETTINGS)["change"]
    assert change["perplexity"]["words"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 8}
    for name in ("writing", "reading"):
        assert change[name]["experts_per_sequence"]["mean"] == 0
        ratios = [r for one in change[name]["transfers_per_token"].values() for r in one["ratio"]]
        assert ratios and all(r["low"] == r["mean"] == r["high"] == 1 for r in ratios)


def test_plain_text_is_continued_from_its_half(checkpoints):
    """Text without prompts still has something to write after, and to read."""
    base = checkpoints / "base"
    plain = [Example("", f"w{i} w4 w5 w6 w7 w8", f"x:{i}") for i in range(3, 9)]
    outcome = measure_outcome(base, base, {"plain": plain}, settings=SETTINGS)
    assert len(outcome["after"]["writing"]["experts_per_sequence"]) == 5


def test_the_origin_is_recorded(tuned, checkpoints):
    """Base by name, its licence, and the data's hash; what fine-tuning wrote stays."""
    metadata = read_metadata(tuned)
    assert (metadata["base"], metadata["license"]) == ("base", "mit")
    digest = hashlib.sha256((checkpoints / "train.jsonl").read_bytes()).hexdigest()
    assert metadata["data"]["sha256"] == digest
    assert metadata["settings"]["capacity"] == 0.25 and len(metadata["log"]) == 4
    assert str(checkpoints) not in json.dumps(metadata)


@pytest.fixture
def copy(tuned, tmp_path):
    """The tuned checkpoint's melinoe.json in a directory of its own."""
    path = tmp_path / "my-model"
    path.mkdir()
    shutil.copy(tuned / "melinoe.json", path)
    return path


def test_a_card_holds_the_numbers_and_the_hub_reads_its_front_matter(copy):
    """The licence and tags as the hub's own library reads them; a cell as the file has it."""
    from huggingface_hub import ModelCard

    files = write_card(copy)
    card = ModelCard.load(copy / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "transformers"
    assert "mixture-of-experts" in card.data.tags and card.data.base_model is None
    outcome = read_metadata(copy)["outcome"]
    before = outcome["before"]["perplexity"]["words"]["perplexity"]["mean"]
    assert f"| words (in domain) | {before:.4g} " in card.text.replace(",", "")
    assert "transfers per token, LRU, 2 slots (trained for)" in card.text
    for file in files[1:]:
        assert f"]({file.name})" in card.text
        with Image.open(file) as image:
            colours = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
        assert (colours == 255).all(axis=1).any() and len(colours) > 20
    assert {file.name for file in copy.iterdir()} == {"melinoe.json", *(f.name for f in files)}


def test_a_card_written_again_is_the_same_and_keeps_what_a_person_wrote(copy):
    """Bytes equal, figures too; text below the last line and added front matter stay."""
    first = {file.name: file.read_bytes() for file in write_card(copy)}
    assert {file.name: file.read_bytes() for file in write_card(copy)} == first
    card = copy / "README.md"
    text = card.read_text().replace("license: mit\n", "license: mit\nthumbnail: me.png\n")
    card.write_text(text + "\nMy own words.\n")
    write_card(copy)
    again = card.read_text()
    assert again.endswith("My own words.\n") and again.count("My own words.") == 1
    assert "thumbnail: me.png" in again


def test_an_unknown_licence_is_said_and_a_persons_answer_kept(copy):
    """`unknown` is the hub's word; once somebody found out, that stands."""
    metadata = read_metadata(copy)
    write_metadata(copy, metadata | {"license": None})
    write_card(copy)
    card = copy / "README.md"
    assert "license: unknown\n" in card.read_text() and "No licence is known" in card.read_text()
    card.write_text(card.read_text().replace("license: unknown", "license: apache-2.0"))
    write_card(copy)
    assert "license: apache-2.0\n" in card.read_text()
    assert "No licence is known" not in card.read_text()


def test_a_hub_base_and_data_set_stand_in_the_front_matter(copy):
    """So that the hub links them; the configuration behind the colon is not part of the name."""
    from huggingface_hub import metadata_load

    about = {"base": "allenai/OLMoE-1B-7B-0924", "base_model": "allenai/OLMoE-1B-7B-0924"}
    data = {"source": "openai/gsm8k:main", "hub": True, "split": "train", "examples": 5}
    write_metadata(copy, {**read_metadata(copy), **about, "data": data})
    write_card(copy)
    header = metadata_load(copy / "README.md")
    assert header["base_model"] == about["base_model"]
    assert header["datasets"] == ["openai/gsm8k"]
    assert "https://huggingface.co/allenai/OLMoE-1B-7B-0924" in (copy / "README.md").read_text()


def test_a_card_without_measurements_says_so(copy):
    """And draws the losses alone; a control is called one."""
    write_metadata(copy, {"settings": {"lambda_cache": 0.0}, "log": [{"step": 3, "nll": 2.0}]})
    files = write_card(copy)
    text = files[0].read_text()
    assert [file.name for file in files] == ["README.md", "melinoe-losses.png"]
    assert "Nothing was measured" in text and "it is the control" in text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lambda_cache": 0.0, "lambda_rank": 0.0, "lambda_reuse": 0.3}, "keeps to few experts"),
        ({"lambda_cache": 0.0, "lambda_rank": 0.0}, "it is the control"),
        ({"lambda_cache": 0.0, "lambda_rank": 0.1, "anchor": "none"}, "it is the control"),
        ({"lambda_cache": 0.0, "lambda_rank": 0.1}, "without locality terms"),
        (
            {"lambda_cache": 0.0, "lambda_rank": 0.0, "lambda_distill": 1.0},
            "without locality terms",
        ),
    ],
)
def test_a_card_says_what_the_model_was_trained_for(copy, settings, said):
    """The reuse term is one for locality too; an anchor alone makes no control."""
    write_metadata(copy, read_metadata(copy) | {"settings": settings})
    text = write_card(copy)[0].read_text()
    assert said in text
    assert ("(trained for)" in text) is (said == "keeps to few experts")
    write_metadata(copy, {"settings": settings})
    text = write_card(copy)[0].read_text()
    assert "slots=SLOTS" in text and "slots=16" not in text


def test_a_card_that_cannot_be_written_or_read_is_said_in_a_sentence(copy):
    """A place that is taken by a directory; an earlier card that is no text."""
    (copy / "melinoe-losses.png").mkdir()
    with pytest.raises(WriteError, match="cannot write"):
        write_card(copy)
    (copy / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        write_card(copy)


def test_a_foreign_readme_is_not_replaced_unless_told(copy):
    """Somebody wrote it."""
    (copy / "README.md").write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        write_card(copy)
    assert [file.name for file in copy.iterdir() if file.suffix == ".png"] == []
    write_card(copy, overwrite=True)
    assert "mine" not in (copy / "README.md").read_text().split()


def test_no_metadata_and_a_broken_one_are_refused(tmp_path):
    """A card is written from melinoe.json alone."""
    with pytest.raises(CheckpointError, match="has no melinoe"):
        write_card(tmp_path)
    (tmp_path / "melinoe.json").write_text('{"outcome": {"examples": 3}}')
    with pytest.raises(CheckpointError, match="outcome has no 'prompts'"):
        write_card(tmp_path)
    with pytest.raises(CheckpointError, match="no directory"):
        write_card(tmp_path / "absent")


def test_one_prompt_bears_no_claim():
    """Nothing can be resampled, so the interval has no width and the sentence says why."""
    from melinoe.report.card.text import _times
    from melinoe.stats import Estimate

    assert "one prompt alone shows nothing about the next" in _times(Estimate(3.0, 3.0, 3.0, 1))
    assert "times fewer" in _times(Estimate(3.0, 2.5, 3.5, 9))
    assert "**more**" in _times(Estimate(0.5, 0.4, 0.6, 9))
