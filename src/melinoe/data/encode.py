"""
Token ids of examples, and which of them are completion.

Prompt and completion are tokenised apart, so that the border between them is exact.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from melinoe.data.examples import Example, Turn
from melinoe.errors import DataError, TokenizerError

log = logging.getLogger(__name__)


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
        if turn["role"] != "assistant" or index < example.prompt_turns:
            continue
        before = _render(tokenizer, turns[:index], example.tools, add_generation_prompt=True)
        after = _render(tokenizer, turns[: index + 1], example.tools, add_generation_prompt=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"{example.source} cannot be cut into turns because the chat template rewrites "
                "earlier ones; give prompt and completion instead"
            )
        yield ids(before[len(done) :]), False
        yield ids(after[len(before) :]), True
        done = after


def _render(
    tokenizer: Any, turns: list[Turn], tools: tuple[Any, ...] | None, **options: bool
) -> str:
    if not turns:
        return ""
    given = {} if tools is None else {"tools": list(tools)}
    return tokenizer.apply_chat_template(turns, tokenize=False, **given, **options)


def pad_token_id(tokenizer: Any) -> int:
    """The tokenizer's padding id, or its end-of-text id where it has none; padding is masked."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
