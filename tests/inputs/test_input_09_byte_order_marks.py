"""Byte-order marks, line ends, blank lines, lists of rows: as editors and exports write them."""

import gzip
import json
import shutil
from codecs import BOM_UTF8
from types import SimpleNamespace

import pytest
from safetensors import safe_open

from melinoe.checkpoint import load_tokenizer, read_metadata
from melinoe.checkpoint.files import read_config
from melinoe.cli.models import _chat_template
from melinoe.data import load_examples
from melinoe.engine.load import load
from melinoe.errors import DataError, MelinoeError, TokenizerError
from melinoe.finetune.adapter import CONFIG, WEIGHTS, read_adapter_config
from melinoe.plan.facts import model_facts
from melinoe.predictor import load_prompts
from melinoe.report.records import read_records
from melinoe.serve.run import Residency
from melinoe.shipped import TINY_OLMOE

ROWS = [{"text": "a ä"}, {"text": "b"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
SPELLINGS = {
    "plain": LINES.encode(),
    "byte-order mark": LINES.encode("utf-8-sig"),
    "CRLF": LINES.replace("\n", "\r\n").encode(),
    "CRLF and a mark": LINES.replace("\n", "\r\n").encode("utf-8-sig"),
    "no last line end": LINES.rstrip("\n").encode(),
    "blank last line": (LINES + "\n").encode(),
    "blank last lines": (LINES + "\n  \r\n\n").encode(),
    "a list": json.dumps(ROWS).encode(),
    "a list over lines": json.dumps(ROWS, indent=1).encode("utf-8-sig"),
    "a list after a blank line": ("\n" + json.dumps(ROWS)).encode(),
}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.txt", "rows.jsonl.gz"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_same_rows_are_read(tmp_path, spelling, name):
    """Whatever an editor did to the file's bytes."""
    path = tmp_path / name
    blob = SPELLINGS[spelling]
    path.write_bytes(gzip.compress(blob) if name.endswith(".gz") else blob)
    assert [one.completion for one in load_examples(path)] == ["a ä", "b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"text": "a"},\n{"text": "b"}\n', ":1 is not JSON .*no comma after it"),
        ('{"text": "a",}\n', ":1 is not JSON .*one object per line"),
        ('[{"text": "a"},]', "is not JSON .*one list of objects"),
        ('{\n "text": "a"\n}\n', ":1 is not JSON"),
        ('{"text": "a"}\n\n{"text": "b"}\n', ":2 is empty"),
        ('{"text": "a", "text": "b"}\n', ":1 is not JSON .*text stands twice"),
        ('{"text": ' + "9" * 5000 + "}\n", ":1 is not JSON"),
        ('{"text": ' + "[" * 100_000 + "}\n", ":1 is not JSON"),
        ("", "has no rows"),
        ("\n \n", "has no rows"),
        ("[]", "has no rows"),
        ("[1]", r"\[0\] is not an object"),
    ],
)
def test_what_is_no_json_says_where_and_what_to_write(tmp_path, text, words):
    """One sentence, with file and line."""
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"rows\.jsonl.*{words}|{words}") as raised:
        load_examples(path)
    assert "rows.jsonl" in str(raised.value) and "\n" not in str(raised.value)


@pytest.fixture
def marked(tmp_path):
    """The shipped model, in shards, every JSON file but the tokenizer's with a mark."""
    path = tmp_path / "marked"
    shutil.copytree(TINY_OLMOE, path)
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    with safe_open(path / "model-00001-of-00001.safetensors", "pt") as shard:
        index = {"weight_map": dict.fromkeys(shard.keys(), "model-00001-of-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "melinoe.json").write_text('{"base": "somebody/model"}')
    for file in path.glob("*.json"):
        if not file.name.startswith("tokenizer"):
            file.write_bytes(BOM_UTF8 + file.read_bytes())
    return path


def test_a_checkpoint_with_marks_is_read_as_without(marked):
    """Config, generation config, index and melinoe.json; the tokenizer asks for the config too."""
    model, _ = load(marked, slots=4)
    plain, _ = load(TINY_OLMOE, slots=4)
    left_out = {"_name_or_path", "transformers_version"}
    for one, other in (
        (model.config, plain.config),
        (model.generation_config, plain.generation_config),
    ):
        found, expected = one.to_dict(), other.to_dict()
        assert {k: v for k, v in found.items() if k not in left_out} == {
            k: v for k, v in expected.items() if k not in left_out
        }
    assert read_metadata(marked) == {"base": "somebody/model"}
    assert load_tokenizer(str(marked), model.config)("a b")["input_ids"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_mark_that_transformers_cannot_read_is_named(marked, name):
    """These files it reads itself: the sentence names the file, the fault and the way out."""
    (marked / name).write_bytes(BOM_UTF8 + (marked / name).read_bytes())
    with pytest.raises(TokenizerError, match=rf"{name} begins with a byte-order mark.*without one"):
        load_tokenizer(str(marked), read_config(str(marked)))


def of_an_adapter(file):
    (file.parent / WEIGHTS).touch()
    return read_adapter_config(file.parent)


def of_a_residency(file):
    found = []
    handle = SimpleNamespace(slots_by_layer=[4], prefetch=found.extend)
    return Residency(file, handle, "print").restore() and found


# Name of a file, what is in it, and what reads it.
JSON_FILES = {
    "config.json": ((TINY_OLMOE / "config.json").read_text(), lambda f: model_facts(str(f))),
    "melinoe.json": ('{"base": "somebody/model"}', lambda f: read_metadata(f.parent)),
    CONFIG: ('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}', of_an_adapter),
    "records.json": ('[{"kind": "demo"}]', lambda f: read_records([f]).by_kind),
    "records.jsonl": ('{"kind": "demo"}', lambda f: read_records([f]).by_kind),
    "t.prompts.json": (
        '{"format": "melinoe-prompts", "version": 1, "fingerprint": "m", "prompts": [[1, 2]]}',
        lambda f: load_prompts(f.parent / "t.safetensors", SimpleNamespace(fingerprint="m")),
    ),
    "residency.json": ('{"resident": [[1, 2]], "fingerprint": "print"}', of_a_residency),
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_every_json_file_is_read_with_a_mark_and_refused_in_a_sentence(tmp_path, name):
    """With a mark as without; nested deeper than Python reads, a number of 400 digits, bytes."""
    text, read = JSON_FILES[name]
    file = tmp_path / name
    file.write_text(text)
    expected = read(file)
    file.write_bytes(BOM_UTF8 + text.encode())
    assert read(file) == expected
    deep, large = '{"a": ' + "[" * 100_000, text.replace("{", '{"b": ' + "9" * 400 + ", ", 1)
    for blob in (deep.encode(), large.encode(), b'{"a": "\xff"}', b"5", b"null"):
        file.write_bytes(blob)
        with pytest.raises(MelinoeError) as raised:
            read(file)
        assert "\n" not in str(raised.value)


def test_a_chat_template_is_read_without_its_mark(tmp_path):
    """Else each prompt would begin with it."""
    template = tmp_path / "t.jinja"
    template.write_bytes(BOM_UTF8 + b"{{ messages }}")
    assert _chat_template(str(template)) == "{{ messages }}"
