"""
Examples from files or the hub: a prompt to condition on and a completion to learn.

A row has one of the forms of docs/data.md, the first of `_READERS` if it has several: TRL's
("messages", "prompt" and "completion", "text"), GSM8K's, Dolly's, Alpaca's, or a prompt alone.
Columns of other names can be named. Nothing is repaired or left out in silence: a row that cannot
be used as it stands is an error that names file and line, a column that no form reads is said.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from melinoe.data.rows import named_counts, read_rows, say_once
from melinoe.data.turns import ASSISTANT, Turn, parse_list, read_turns, says_something
from melinoe.errors import DataError

FORMS = '"text", "prompt" and "completion", "messages", or "question" and "answer"'
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{}\n\n{}### Response:\n"
)
# Columns that elsewhere change what a model reads or learns: to pass over them would be silent.
_TELLING = {
    *("tools", "documents", "chat_template_kwargs", "system", "system_prompt", "history"),
    *("images", "image", "videos", "video", "audio", "audios"),
    *("weight", "train", "mask", "loss_mask", "completion_mask", "assistant_masks"),
}


@dataclass(frozen=True)
class Example:
    """One row. DataError for a text that no tokenizer can read."""

    prompt: str  # what the model is given; empty for plain text. Unused where *messages* is set
    # What it should write; empty for a prompt alone. Unused where *messages* is set.
    completion: str
    source: str  # where the row stands, as ``file:line`` or ``hub-name[row]``, for messages
    # A chat, kept as it is until a tokenizer with a chat template renders it.
    messages: tuple[Turn, ...] | None = None
    # Places in *messages* of the turns to learn; ``None``: every assistant turn.
    learned: tuple[int, ...] | None = None
    # What the chat template is given besides: ``tools``, ``documents`` and so on.
    template: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("prompt", "completion", "messages", "template"):
            _check_texts(getattr(self, key), key, self.source)

    @property
    def learned_turns(self) -> tuple[int, ...]:
        """Places in a chat of the turns to learn, in order."""
        if self.learned is not None:
            return self.learned
        turns = enumerate(self.messages or ())
        return tuple(place for place, turn in turns if turn["role"] == ASSISTANT)


def load_examples(
    path_or_hub_name: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    columns: Mapping[str, str] | str | None = None,
    prompts: bool = False,
) -> list[Example]:
    """
    Read examples from a file, a directory, or a hub data set (`melinoe.data.rows.read_rows`).

    Args:
        limit: Read only so many rows. Lines after the limit are not checked.
        columns: A form's key to the data's own name for it, or all of that in words:
            ``prompt=question,completion=answer``; then no other column is read.
        prompts: Prompts are wanted: a row without a completion will do, plain text will not.

    Raises:
        DataError: nothing there, no rows, or a row that cannot be used as it stands.
    """
    ignored: Counter[str] = Counter()
    if isinstance(columns, str):
        columns = _parse_columns(columns)
    if unknown := sorted(set(columns or ()) - _KEYS):
        known = ", ".join(sorted(_KEYS))
        raise DataError(f"{unknown[0]!r} is no key that a row is read by; those are {known}")
    rows: Iterator[tuple[str, Any]] = islice(read_rows(path_or_hub_name, split), limit)
    examples = [_example(row, source, columns, prompts, ignored) for source, row in rows]
    if not examples:
        raise DataError(f"{path_or_hub_name} has no rows; give at least one of the form {FORMS}")
    if ignored:
        about = f"{path_or_hub_name}: {len(examples)} rows"
        say_once(f"{about}; ignored columns: {named_counts(ignored)}")
    return examples


def digest(examples: Iterable[Example]) -> str:
    """Give the SHA-256, in hex, of what examples hold, wherever they stand."""
    made = hashlib.sha256()
    for example in examples:
        row = {key: value for key, value in asdict(example).items() if key != "source"}
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
        made.update(f"{text}\n".encode())
    return made.hexdigest()


def _parse_columns(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    found = {key.strip(): column.strip() for key, _, column in pairs}
    if len(found) < len(pairs) or not all(found) or not all(found.values()):
        raise DataError(f"columns {text!r} are not of the form prompt=NAME,completion=NAME")
    return found


def _example(
    row: Any, source: str, columns: Mapping[str, str] | None, prompts: bool, ignored: Counter[str]
) -> Example:
    if not isinstance(row, Mapping):
        raise DataError(f"{source} is not an object; give it the keys {FORMS}")
    given = {str(key): value for key, value in row.items()}
    for column in (columns or {}).values():
        if column not in given:
            raise DataError(f"{source} has no column {column!r}; it has {sorted(given)}")
    others: set[str] = set()
    if columns:
        there = {key for key, one in given.items() if one is not None}
        others = there.difference(columns.values())
        given = {key: given[column] for key, column in columns.items()}
    left = {key: value for key, value in given.items() if value is not None}
    form = next((form for form in _READERS if left.keys() >= set(form)), None)
    if form is None:
        raise DataError(
            f"{source} has the keys {sorted(left)}; give it {FORMS}, or say which columns these "
            "are, as in --columns prompt=NAME,completion=NAME"
        )
    example = _READERS[form](left, source)
    for key in _TELLING & left.keys():
        # What is empty, or says that the row is to be learned, says what is done anyway.
        if left.pop(key) not in ("", [], {}, True):
            raise DataError(
                f'{source} has a "{key}" that would change what is read or learned, and is not '
                "read in this form; remove it, or name the columns to read (--columns "
                f"{','.join(f'{key}={key}' for key in form)})"
            )
    ignored.update(others | left.keys())
    if not prompts and not (example.completion or (example.messages and example.learned_turns)):
        raise DataError(
            f"{source} has the keys {sorted(given)}, which is a prompt and nothing to learn; add a "
            "completion, or say which column it is (--columns prompt=prompt,completion=NAME)"
        )
    if prompts and form == ("text",):
        raise DataError(
            f"{source} is plain text without a prompt to answer; give prompts, or take the text "
            "for one (--columns prompt=text)"
        )
    return example


def _refuse_pair(row: dict[str, Any], source: str) -> Example:
    chosen, key = row["chosen"], "text"
    if isinstance(row.get("prompt"), type(chosen)):
        key = "prompt=prompt,completion"
    elif not isinstance(chosen, str):
        key = "messages"
    raise DataError(
        f"{source} is a pair of answers, and nothing says which to learn; to learn the chosen one "
        f"give --columns {key}=chosen"
    )


def _refuse_steps(row: dict[str, Any], source: str) -> Example:
    raise DataError(
        f"{source} is an answer in rated steps, and nothing says which to learn; join those that "
        'are right to one "completion"'
    )


def _read_chat(row: dict[str, Any], source: str) -> Example:
    key = "messages" if "messages" in row else "conversations"
    turns, learned = read_turns(row.pop(key), key, source)
    return _chat(row, turns, learned, source)


def _read_pair(row: dict[str, Any], source: str) -> Example:
    if "label" in row and (label := row.pop("label")) is not True:
        raise DataError(
            f'{source} has the "label" {label!r}, and only answers rated true can be learned; '
            "remove the row, or the column if it is no rating"
        )
    if not isinstance(row["prompt"], list) or not isinstance(row["completion"], list):
        prompt = _string(row, "prompt", source, may_be_empty=True)
        return Example(prompt, _string(row, "completion", source), source)
    before, _ = read_turns(row.pop("prompt"), "prompt", source)
    after, learned = read_turns(row.pop("completion"), "completion", source)
    return _chat(row, before + after, [len(before) + place for place in learned], source)


def _read_prompt(row: dict[str, Any], source: str) -> Example:
    if not isinstance(row["prompt"], list):
        return Example(_string(row, "prompt", source), "", source)
    turns, _ = read_turns(row.pop("prompt"), "prompt", source)
    return _chat(row, turns, None, source)


def _read_text(row: dict[str, Any], source: str) -> Example:
    return Example("", _string(row, "text", source), source)


def _read_question(row: dict[str, Any], source: str) -> Example:
    answer = _string(row, "answer", source)
    prompt = f"Question: {_string(row, 'question', source)}\nAnswer:"
    return Example(prompt, f" {answer}", source)


def _read_instruction(row: dict[str, Any], source: str) -> Example:
    more, answer = ("context", "response") if "response" in row else ("input", "output")
    context = _string(row, more, source, may_be_empty=True) if more in row else ""
    about = ", paired with an input that provides further context" if context else ""
    given = f"### Input:\n{context}\n\n" if context else ""
    prompt = _ALPACA.format(about, _string(row, "instruction", source), given)
    return Example(prompt, _string(row, answer, source), source)


_READERS: dict[tuple[str, ...], Callable[[dict[str, Any], str], Example]] = {
    ("messages",): _read_chat,
    ("conversations",): _read_chat,
    ("prompt", "completion"): _read_pair,
    ("question", "answer"): _read_question,
    ("instruction", "response"): _read_instruction,
    ("instruction", "output"): _read_instruction,
    ("text",): _read_text,
    ("chosen", "rejected"): _refuse_pair,
    ("completions", "labels"): _refuse_steps,
    ("prompt",): _read_prompt,
}
# The keys that a row may be read by.
_KEYS = {
    *("messages", "conversations", "tools", "documents", "chat_template_kwargs", "system"),
    *("prompt", "completion", "label", "text", "question", "answer"),
    *("instruction", "context", "response", "input", "output"),
}


def _chat(
    row: dict[str, Any], turns: list[Turn], learned: list[int] | None, source: str
) -> Example:
    """Make an example of a chat; what stands beside it in the row goes to the template."""
    template: dict[str, Any] = {}
    for key in ("tools", "documents"):
        if key in row and (found := parse_list(row.pop(key), f'{source} has "{key}"')):
            template[key] = found
    if "chat_template_kwargs" in row:
        options = row.pop("chat_template_kwargs")
        if not isinstance(options, Mapping):
            raise DataError(f'{source} has "chat_template_kwargs" that are no object; write one')
        template.update((key, value) for key, value in options.items() if value is not None)
    if (system := row.pop("system", "")) != "":
        if turns[0]["role"] == "system":
            raise DataError(f'{source} has a "system" and a system turn; keep one of them')
        content = _string({"system": system}, "system", source)
        turns = [{"role": "system", "content": content}, *turns]
        learned = None if learned is None else [place + 1 for place in learned]
    if learned is None:  # a prompt alone
        return Example("", "", source, tuple(turns), learned=(), template=template)
    if not any(says_something(turns[place]) for place in learned):
        raise DataError(f"{source} has no assistant turn to learn from; remove the row")
    return Example("", "", source, tuple(turns), learned=tuple(learned), template=template)


def _string(row: dict[str, Any], key: str, source: str, *, may_be_empty: bool = False) -> str:
    value = row.pop(key)
    if not isinstance(value, str):
        raise DataError(f'{source} has a "{key}" that is not a string; write it in quotes')
    if not value.strip() and not may_be_empty:
        raise DataError(f'{source} has an empty "{key}"; fill it or remove the row')
    return value


def check_text(text: str, what: str) -> None:
    """Refuse a text that holds half of a character, or a byte that was no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} has half of a character (\\u{ord(text[error.start]):04x}), or a byte that is "
            "no UTF-8; mend or remove it"
        ) from None


def _check_texts(value: Any, key: str, source: str) -> None:
    """Check every text in what a row holds, at any depth."""
    if isinstance(value, str):
        check_text(value, f'{source} in its "{key}"')
    elif isinstance(value, Mapping):
        for name, one in value.items():
            check_text(str(name), f'{source} in a name in its "{key}"')
            _check_texts(one, str(name), source)
    elif isinstance(value, list | tuple):
        for one in value:
            _check_texts(one, key, source)
