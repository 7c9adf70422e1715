"""
Examples from a file or the hub: a prompt to condition on and a completion to learn.

Rows of a JSONL file, or of a hub data set, have one of these forms (other keys are ignored). All
but the last are TRL's:

    {"text": ...}                         all of it is completion
    {"prompt": ..., "completion": ...}    two strings
    {"messages": [{"role", "content"}]}   rendered by the tokenizer's chat template; every assistant
                                          turn is completion, the rest is prompt
    {"prompt": [turns], "completion": [turns]}
                                          the same, but the prompt's assistant turns are not learned
    {"conversations": [{"from", "value"}]}
                                          as messages, in ShareGPT's words
    {"question": ..., "answer": ...}      as in GSM8K: prompt "Question: ...\\nAnswer:"

A chat may bring "tools", which its template renders too. Nothing is repaired in silence: a row that
is empty or of another form is an error that names the file and the line.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from melinoe.errors import DataError

FORMS = '"text", "prompt" and "completion", "messages", or "question" and "answer"'
_SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names of roles; others are kept

Turn = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """
    One row.

    Attributes:
        prompt: What the model is given; empty for plain text. Unused where *messages* is set.
        completion: What it should write. Unused where *messages* is set.
        source: Where the row stands, as ``file:line`` or ``hub-name[row]``, for messages.
        messages: A chat, kept as it is until a tokenizer with a chat template renders it.
        answer: The bare answer of a question row, for scoring; ``None`` for other forms.
        prompt_turns: So many of the first messages are prompt, whoever speaks.
        tools: Descriptions of functions for the chat template; ``None`` if there are none.
    """

    prompt: str
    completion: str
    source: str
    messages: tuple[Turn, ...] | None = None
    answer: str | None = None
    prompt_turns: int = 0
    tools: tuple[Any, ...] | None = None


def load_examples(
    path_or_hub_name: str | Path, *, split: str = "train", limit: int | None = None
) -> list[Example]:
    """
    Read examples from a JSONL file, a directory of JSONL files, or a hub data set.

    Args:
        path_or_hub_name: A path if one exists there; else a name on the hub, with its
            configuration after a colon where it needs one: ``openai/gsm8k:main``.
        split: Split of a hub data set; files have none and ignore it.
        limit: Read only so many rows; ``None`` reads all. Lines after the limit are not checked.

    Raises:
        DataError: nothing there, no rows, or a row that is empty or of no known form.
    """
    path = Path(path_or_hub_name)
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise DataError(f"{path} holds no .jsonl file; name a file or a directory that does")
        rows: Iterator[tuple[str, Any]] = (row for file in files for row in _read_jsonl(file))
    elif path.is_file():
        rows = _read_jsonl(path)
    elif path.suffix in (".jsonl", ".json"):
        raise DataError(f"{path} does not exist; check the path")
    else:
        rows = _read_hub(str(path_or_hub_name), split)
    examples = [_example(row, source) for source, row in islice(rows, limit)]
    if not examples:
        raise DataError(f"{path_or_hub_name} has no rows; give at least one of the form {FORMS}")
    return examples


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                source = f"{path}:{number}"
                if not line.strip():
                    raise DataError(f"{source} is empty; remove the line")
                try:
                    yield source, json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{source} is not JSON ({error.msg}); write one object per line"
                    ) from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; convert it") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from None


def _read_hub(name: str, split: str) -> Iterator[tuple[str, Any]]:
    # Slow to import, and needed for hub names only.
    from datasets import load_dataset

    dataset_name, _, configuration = name.partition(":")
    try:
        dataset = load_dataset(dataset_name, configuration or None, split=split)
    except Exception as error:  # the library raises many kinds, for one fact: it is not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"no file and no hub data set {name} with split {split} can be read ({reason}); "
            "check the name, or give a JSONL file"
        ) from error
    for number, row in enumerate(dataset):
        yield f"{name}[{number}]", row


def _example(row: Any, source: str) -> Example:
    if not isinstance(row, Mapping):
        raise DataError(f"{source} is not an object; give it the keys {FORMS}")
    tools = tuple(row["tools"]) if isinstance(row.get("tools"), list) and row["tools"] else None
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            return Example("", "", source, messages=_chat(row, key, source), tools=tools)
    if "prompt" in row and "completion" in row:
        if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
            prompt_turns = _turns(row, "prompt", source)
            turns = prompt_turns + _chat(row, "completion", source)
            return Example(
                "", "", source, messages=turns, prompt_turns=len(prompt_turns), tools=tools
            )
        prompt = _string(row, "prompt", source, may_be_empty=True)
        return Example(prompt, _string(row, "completion", source), source)
    if "question" in row and "answer" in row:
        answer = _string(row, "answer", source)
        prompt = f"Question: {_string(row, 'question', source)}\nAnswer:"
        return Example(prompt, f" {answer}", source, answer=answer)
    if "text" in row:
        return Example("", _string(row, "text", source), source)
    raise DataError(f"{source} has the keys {sorted(map(str, row))}; give it {FORMS}")


def _string(row: Mapping[str, Any], key: str, source: str, *, may_be_empty: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f'{source} has a "{key}" that is not a string; write it in quotes')
    if not value.strip() and not may_be_empty:
        raise DataError(f'{source} has an empty "{key}"; fill it or remove the row')
    return value


def _chat(row: Mapping[str, Any], key: str, source: str) -> tuple[Turn, ...]:
    turns = _turns(row, key, source)
    if not any(turn["role"] == "assistant" and _says_something(turn) for turn in turns):
        raise DataError(f"{source} has no assistant turn to learn from; remove the row")
    return turns


def _turns(row: Mapping[str, Any], key: str, source: str) -> tuple[Turn, ...]:
    value = row[key]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f'{source} has "{key}" that are no list of turns; see {FORMS}')
    return tuple(_turn(one, source) for one in value)


def _turn(value: Any, source: str) -> Turn:
    if isinstance(value, Mapping) and "from" in value and "value" in value:
        role = value["from"]
        value = {"role": _SPEAKERS.get(role, role), "content": value["value"]}
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise DataError(f'{source} has a turn without "role" and "content" strings; add them')
    # Data sets fill a column with nulls where a turn lacks it; templates ask whether it is there.
    turn = {key: one for key, one in value.items() if one is not None}
    if not isinstance(turn.get("content"), str) and not turn.get("tool_calls"):
        raise DataError(f'{source} has a turn without "role" and "content" strings; add them')
    return turn


def _says_something(turn: Turn) -> bool:
    return bool(turn.get("tool_calls") or turn.get("content", "").strip())
