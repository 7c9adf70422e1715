"""A file of requests: answered as each alone would be, resumed, and refused where it is wrong."""

import json

import pytest

from melinoe import load
from melinoe.checkpoint import load_tokenizer
from melinoe.errors import DataError, MelinoeError, OutputExistsError
from melinoe.serve.batching import Limits
from melinoe.serve.offline import answer_file, named_model, read_rows
from melinoe.shipped import TINY_OLMOE

PROMPTS = ["The United States is", "def f(x):", "In the beginning", "Call me Ishmael.", "Let x be"]
TOKENS = [12, 20, 7, 16, 10]
# A step computes three of the five, so that one joins when another has ended.
LIMITS = Limits(running=3, waiting=1, context=256, max_tokens=64, cache_tokens=1024, chunk=64)


@pytest.fixture(scope="module")
def tiny():
    """The shipped model with a quarter of its experts resident."""
    model, handle = load(TINY_OLMOE, slots=8, dtype="bfloat16", device="cpu")
    return model, handle, load_tokenizer(TINY_OLMOE, model.config)


@pytest.fixture
def rows(tmp_path):
    """Five completions of different lengths."""
    return written(
        tmp_path,
        *(
            {"custom_id": f"r{at}", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
            for at, (prompt, tokens) in enumerate(zip(PROMPTS, TOKENS, strict=True))
        ),
    )


class Stopped(Exception):
    """Ends a run in the middle."""


def written(tmp_path, *lines):
    path = tmp_path / "in.jsonl"
    path.write_text(
        "".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines)
    )
    return read_rows(path)


def answers(out):
    return [json.loads(line) for line in out.read_text().splitlines()]


def texts(out):
    return [one["response"]["body"]["choices"][0]["text"] for one in answers(out)]


def test_each_text_is_the_one_that_its_prompt_has_alone(tiny, rows, tmp_path, offline):
    """Five requests, three at once, a quarter of the experts; alone with all resident: the same."""
    out = tmp_path / "out.jsonl"
    made = answer_file(*tiny, rows, out, limits=LIMITS)
    assert texts(out) == [offline[0](*one) for one in zip(PROMPTS, TOKENS, strict=True)]
    assert [one["custom_id"] for one in answers(out)] == ["r0", "r1", "r2", "r3", "r4"]
    assert (made.rows, made.kept, made.refused) == (5, 0, 0)
    assert made.completion_tokens == sum(TOKENS)
    assert list(tmp_path.glob("*unfinished*")) == []


def test_requests_of_one_step_share_what_it_loads(tiny, tmp_path):
    """Five times the same prompt at once: little more is loaded than for one; in turn, more."""
    same = [{"prompt": PROMPTS[1], "max_tokens": 20, "temperature": 0}] * 5
    loaded = {}
    for running, lines in ((1, same[:1]), (5, same), (1, same)):
        tiny[1].reset_cache()
        made = answer_file(
            *tiny, written(tmp_path, *lines), tmp_path / f"{running} of {len(lines)}",
            limits=LIMITS._replace(running=running),
        )  # fmt: skip
        loaded[running, len(lines)] = made.experts_loaded
    assert len(set(texts(tmp_path / "5 of 5"))) == 1
    assert loaded[5, 5] < 2 * loaded[1, 1] < loaded[1, 5]


def test_a_run_that_was_killed_goes_on(tiny, rows, tmp_path):
    """Two answers and half of a third are kept: the two stay, the other three are asked."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    answer_file(*tiny, rows, whole, limits=LIMITS)

    def stop(done, of):
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        answer_file(*tiny, rows, out, limits=LIMITS, progress=stop)
    kept = tmp_path / "out.jsonl.unfinished"
    assert not out.exists() and len(answers(kept)) == 3  # the run, and two answers
    first = kept.read_text()
    kept.write_text(first + '{"id": "batch_req_3", "custom')
    with pytest.raises(OutputExistsError, match="go on with --resume"):
        answer_file(*tiny, rows, out, limits=LIMITS)
    made = answer_file(*tiny, rows, out, limits=LIMITS, resume=True)
    assert made.kept == 2
    assert made.completion_tokens == sum(TOKENS) - sum(
        one["response"]["body"]["usage"]["completion_tokens"]
        for one in map(json.loads, first.splitlines()[1:])
    )
    assert texts(out) == texts(whole)
    assert not kept.exists()


def test_an_unfinished_run_of_another_model_or_file_is_left_alone(tiny, rows, tmp_path):
    """Another model, another prompt, a file of another kind: refused, and kept as it is."""
    out, kept = tmp_path / "out", tmp_path / "out.unfinished"

    def stop(done, of):
        if done == 1:
            raise Stopped

    with pytest.raises(Stopped):
        answer_file(*tiny, rows, out, limits=LIMITS, progress=stop, fingerprint="a")
    before = kept.read_bytes()
    for given in ({"fingerprint": "b"}, {"fingerprint": "a", "rows": rows[:3]}):
        given = {"rows": rows, **given}
        with pytest.raises(OutputExistsError, match="another model or file"):
            answer_file(*tiny, out=out, limits=LIMITS, resume=True, **given)
    assert kept.read_bytes() == before
    for letter in ("a letter\n", "a letter without an end"):
        kept.write_text(letter)
        with pytest.raises(OutputExistsError, match="no unfinished run"):
            answer_file(*tiny, rows, out, limits=LIMITS, resume=True)
        assert kept.read_text() == letter


def test_what_a_request_may_not_ask_is_its_own_answer(tiny, tmp_path):
    """Too many tokens, a field that is not served: a status of 400 beside the others' 200."""
    out = tmp_path / "out.jsonl"
    rows = written(
        tmp_path,
        {"prompt": PROMPTS[0], "max_tokens": 4},
        {"prompt": PROMPTS[0], "max_tokens": 4000},
        {"prompt": PROMPTS[0], "max_tokens": 4, "wings": 2},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"prompt": "In"},
    )
    made = answer_file(*tiny, rows, out, limits=LIMITS._replace(unasked=6))
    got = [one["response"] for one in answers(out)]
    assert [one["status_code"] for one in got] == [200, 400, 400, 400, 200]
    assert "chat template" in got[3]["body"]["error"]["message"]
    assert made.refused == 3
    assert got[4]["body"]["usage"]["completion_tokens"] == 6


def test_a_model_that_fails_ends_the_run_with_what_it_has(tiny, rows, tmp_path, monkeypatch):
    """The worker fails in its eighth step: one sentence; what was answered is kept."""
    model = tiny[0]
    steps, own = [], model.forward

    def fail(*args, **kwargs):
        steps.append(1)
        if len(steps) > 8:
            raise RuntimeError("the card is gone")
        return own(*args, **kwargs)

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(MelinoeError, match=r"was not answered.*--resume"):
        answer_file(*tiny, rows, tmp_path / "out", limits=LIMITS)
    assert not (tmp_path / "out").exists()
    kept = answers(tmp_path / "out.unfinished")[1:]
    assert [one["custom_id"] for one in kept] == ["r2"]  # seven tokens, the only text so short
    monkeypatch.undo()
    assert answer_file(*tiny, rows, tmp_path / "out", limits=LIMITS, resume=True).kept == 1


ROW = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x", "model": "m"}}


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "holds no request"),
        (["{"], "line 1 is no JSON"),
        (['{"prompt": ' + "[" * 100_000], "line 1 is no JSON"),
        (['{"prompt": "a", "seed": ' + "9" * 400 + "}"], "line 1 is no JSON"),
        (["7"], "line 1 is no JSON object"),
        ([{"prompt": "a"}, {"text": "b"}], "line 2 must have either messages or a prompt"),
        ([{"prompt": "a", "messages": []}], "either messages or a prompt"),
        ([{**ROW, "url": "/v1/embeddings"}], "asks for POST /v1/embeddings"),
        ([{**ROW, "method": "GET"}], "asks for GET"),
        ([{**ROW, "body": [1]}], "body that is no JSON object"),
        ([{**ROW, "prompt": "x"}], "has prompt beside its body"),
        ([{**ROW, "custom_id": 3}], "custom_id that is no text"),
        ([ROW, {"prompt": "b"}, ROW], "line 3 has the custom_id 'a' of line 1"),
        ([{"prompt": "a", "stream": True}], "asks for a stream"),
    ],
)
def test_a_wrong_line_is_named_before_anything_runs(tmp_path, lines, sentence):
    """One sentence each."""
    with pytest.raises(DataError, match=sentence):
        written(tmp_path, *lines)


def test_half_of_a_character_in_a_request_is_its_own_fault(tiny, tmp_path):
    """Its row is answered with an error, the others with text; in a name it is refused."""
    lines = ['{"prompt": "\\ud83d", "max_tokens": 2}', {"prompt": "Hi", "max_tokens": 2}]
    out = tmp_path / "out.jsonl"
    assert answer_file(*tiny, written(tmp_path, *lines), out, limits=LIMITS).refused == 1
    first, second = (one["response"] for one in answers(out))
    assert "half of a character" in first["body"]["error"]["message"]
    assert (first["status_code"], second["status_code"]) == (400, 200)
    with pytest.raises(DataError, match=r"line 1 in its custom_id has half of a character"):
        written(tmp_path, '{"custom_id": "\\udcff", "prompt": "Hi"}')


def test_a_file_that_is_none_is_refused(tmp_path):
    """A directory, nothing at all, bytes that are no text."""
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{}")
    for name in (".", "absent", "bytes"):
        with pytest.raises(DataError):
            read_rows(tmp_path / name)


def test_the_model_is_the_one_that_all_requests_name(tmp_path):
    """OpenAI's form names it in each body; several, or none, are refused."""
    assert named_model(written(tmp_path, ROW)) == "m"
    assert named_model(written(tmp_path, ROW, {"prompt": "b"})) == "m"
    other = {**ROW, "custom_id": "b", "body": {"prompt": "x", "model": "n"}}
    for lines in ([ROW, other], [{"prompt": "b"}]):
        with pytest.raises(DataError, match="--model"):
            named_model(written(tmp_path, *lines))


def test_the_command_answers_a_file(melinoe, tmp_path):
    """The model from the file, a template from the command, the sum as JSON."""
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    path.write_text(json.dumps({**ROW, "url": "/v1/chat/completions", "body": body}))
    code, printed, error = melinoe(
        "batch", path, "--out", out, "--slots", 8, "--chat-template", "plain",
        "--max-new-tokens", 5, "--json",
    )  # fmt: skip
    assert code == 0, error
    assert json.loads(printed)["completion_tokens"] == 5
    (answer,) = answers(out)
    assert answer["response"]["body"]["model"] == "tiny"
    assert melinoe("batch", path, "--out", out)[0] == 1  # it exists
