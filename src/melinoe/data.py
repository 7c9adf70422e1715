"""
Examples from a file or the hub: a prompt to condition on and a completion to learn.

Rows of a JSONL file, or of a hub data set, have one of these forms (other keys are ignored):

    {"text": ...}                       all of it is completion
    {"prompt": ..., "completion": ...}
    {"messages": [{"role", "content"}]} rendered by the tokenizer's chat template; every assistant
                                        turn is completion, the rest is prompt
    {"question": ..., "answer": ...}    as in GSM8K: prompt "Question: ...\\nAnswer:"

Nothing is repaired in silence: a row that is empty or of another form is an error that names the
file and the line.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from melinoe.errors import DataError, TokenizerError

log = logging.getLogger(__name__)

FORMS = '"text", "prompt" and "completion", "messages", or "question" and "answer"'
IGNORED = -100  # the label that torch's and transformers' cross entropy leave out


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
    """

    prompt: str
    completion: str
    source: str
    messages: tuple[Mapping[str, str], ...] | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Encoded:
    """
    Token ids of one example and, for each, whether it is completion; equal lengths.

    The first token never counts as completion: nothing stands before it to predict it from.
    """

    input_ids: list[int]
    completion_mask: list[bool]

    def __len__(self) -> int:
        return len(self.input_ids)


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
    if row.get("messages") is not None:
        return Example("", "", source, messages=_messages(row["messages"], source))
    if "prompt" in row and "completion" in row:
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


def _messages(value: Any, source: str) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f'{source} has "messages" that are no list of turns; see {FORMS}')
    for turn in value:
        if not isinstance(turn, Mapping) or not all(
            isinstance(turn.get(key), str) for key in ("role", "content")
        ):
            raise DataError(f'{source} has a turn without "role" and "content" strings; add them')
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in value):
        raise DataError(f"{source} has no assistant turn to learn from; remove the row")
    return tuple(dict(turn) for turn in value)


def encode(examples: Iterable[Example], tokenizer: Any, max_length: int) -> list[Encoded]:
    """
    Turn examples into token ids and say which of them are completion.

    Prompt and completion are tokenised apart, so that the border between them is exact, and
    end-of-text follows the completion (a chat template ends its turns itself). A completion that
    does not fit is cut at its end; an example whose prompt leaves no room for one completion
    token is dropped. Both are counted in one log line.

    Args:
        examples: At least one.
        tokenizer: A transformers tokenizer.
        max_length: Most tokens per example, prompt included.

    Returns:
        The examples that are left, in order.

    Raises:
        DataError: none is left, or a chat template changes earlier turns as the chat grows.
        TokenizerError: chats but no chat template, or no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            "the tokenizer has no end-of-text token, so completions could not end; set eos_token"
        )
    encoded, cut, dropped, first = [], 0, 0, ""
    for example in examples:
        first = first or example.source
        parts = list(_parts(example, tokenizer))
        ids = [token for part, _ in parts for token in part]
        mask = [is_completion for part, is_completion in parts for _ in part]
        if len(ids) > max_length:
            ids, mask = ids[:max_length], mask[:max_length]
            cut += any(mask)
        # The first token has nothing before it to be predicted from.
        mask[:1] = [False]
        if any(mask):
            encoded.append(Encoded(ids, mask))
        else:
            dropped += 1
    if not encoded:
        raise DataError(
            f"no example has a completion token within {max_length} tokens; "
            "raise max_length, or shorten the prompts"
        )
    if cut or dropped:
        log.warning(
            "of %d examples (%s and after) %d were cut at %d tokens and %d dropped (no room for a "
            "completion)",
            len(encoded) + dropped,
            first,
            cut,
            max_length,
            dropped,
        )
    return encoded


def encode_prompt(example: Example, tokenizer: Any) -> list[int]:
    """
    Token ids of the prompt alone, as in training: what generation starts from.

    Of a chat, everything before its last assistant turn; of plain text, the tokenizer's own
    start-of-text tokens and nothing else.

    Raises:
        DataError, TokenizerError: as `encode`.
    """
    if example.messages is None:
        return list(tokenizer(example.prompt)["input_ids"])
    parts = list(_parts(example, tokenizer))
    while not parts[-1][1]:
        parts.pop()
    return [token for part, _ in parts[:-1] for token in part]


def _parts(example: Example, tokenizer: Any) -> Iterator[tuple[list[int], bool]]:
    """Runs of token ids, each with whether it is completion."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    if example.messages is None:
        # Start-of-text comes from the tokenizer's own rule, so an empty prompt may not be empty.
        yield list(tokenizer(example.prompt, verbose=False)["input_ids"]), False
        yield [*ids(example.completion), tokenizer.eos_token_id], True
        return
    if not tokenizer.chat_template:
        raise TokenizerError(
            f"{example.source} is a chat but the tokenizer has no chat template; "
            "give prompt and completion instead"
        )
    turns, done = list(example.messages), ""
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, turns[:index], add_generation_prompt=True)
        after = _render(tokenizer, turns[: index + 1], add_generation_prompt=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"{example.source} cannot be cut into turns because the chat template rewrites "
                "earlier ones; give prompt and completion instead"
            )
        yield ids(before[len(done) :]), False
        yield ids(after[len(before) :]), True
        done = after


def _render(tokenizer: Any, turns: list[Mapping[str, str]], **options: bool) -> str:
    return tokenizer.apply_chat_template(turns, tokenize=False, **options) if turns else ""


@dataclass(frozen=True)
class Collator:
    """
    Pads a batch on the right, to its longest example.

    Gives ``input_ids``, ``attention_mask`` and ``labels``, all int64 ``(batch, tokens)``; labels
    are -100 on prompt and padding. *pad_token_id* may be any valid id: it is masked everywhere.
    """

    pad_token_id: int

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """Collate at least one example."""
        longest = max(len(one) for one in batch)
        shape = (len(batch), longest)
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED)
        for row, one in enumerate(batch):
            ids, mask = torch.tensor(one.input_ids), torch.tensor(one.completion_mask)
            input_ids[row, : len(one)] = ids
            attention_mask[row, : len(one)] = 1
            labels[row, : len(one)] = torch.where(mask, ids, IGNORED)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def pad_token_id(tokenizer: Any) -> int:
    """The tokenizer's padding id, or its end-of-text id where it has none; padding is masked."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
