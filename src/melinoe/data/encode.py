"""
Token ids of examples, and which of them are completion.

Prompt and completion are tokenised apart, so that the border between them is exact.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from melinoe.data.examples import Example
from melinoe.data.rendering import Rendered, render
from melinoe.data.rows import named_counts, say_once
from melinoe.errors import DataError, TokenizerError


@dataclass(frozen=True)
class Encoded:
    """
    Token ids of one example and, for each, whether it is completion; equal lengths.

    The first token never counts as completion: nothing stands before it to predict it from.
    """

    input_ids: list[int]  # token ids
    completion_mask: list[bool]  # whether each is completion
    tokens_cut: int = 0  # how many more there were, beyond the greatest length
    # Assistant turns that are context, because the chat template writes them otherwise once the
    # chat goes on.
    turns_unlearned: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


def encode(examples: Iterable[Example], tokenizer: Any, max_length: int) -> list[Encoded]:
    """
    Turn examples into token ids and say which of them are completion.

    End-of-text follows the completion (a chat template ends its turns itself). An example that is
    longer than *max_length* is cut; one whose prompt leaves no room for one completion token is
    left out. These, and what a chat template does not write, are counted in one line of the log.
    DataError: none is left, or as `render`. TokenizerError: no chat template, or no end-of-text.
    """
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            "the tokenizer has no end-of-text token, so completions could not end; set eos_token"
        )
    examples = list(examples)
    encoded, said = [], _Remarks()
    for example in examples:
        runs, rendered = _runs(example, tokenizer)
        one = _joined(runs, max_length, 0 if rendered is None else rendered.rewritten)
        if one is not None:
            encoded.append(one)
            said.hear(rendered)
    if not encoded:
        raise DataError(
            f"no example has a completion token within {max_length} tokens; "
            "raise max_length, or shorten the prompts"
        )
    losses, words = count_losses(examples, encoded), []
    if losses["shortened"]:
        words.append(
            f"{losses['shortened']} were cut at {max_length} tokens ({losses['tokens_cut']} tokens "
            "fell away)"
        )
    if losses["left_out"]:
        words.append(
            f"{losses['left_out']} left out (no completion token within {max_length} tokens)"
        )
    said.say(examples, words)
    return encoded


def count_losses(examples: Sequence[Example], encoded: Sequence[Encoded]) -> dict[str, int]:
    """Count what `encode` left out, cut short and took as context of *examples*."""
    return {
        "left_out": len(examples) - len(encoded),
        "shortened": sum(one.tokens_cut > 0 for one in encoded),
        "tokens_cut": sum(one.tokens_cut for one in encoded),
        "turns_unlearned": sum(one.turns_unlearned for one in encoded),
    }


def encode_prompts(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    text_tokens: int | None = None,
    chat: bool = False,
) -> list[list[int]]:
    """
    Give the token ids of the prompts alone: what generation starts from.

    Of a chat that is everything before its last turn to learn; of plain text half of the first
    *text_tokens*, which is refused without. With *chat*, a prompt that is a string goes through the
    chat template as a user's turn; training does not do that.
    """
    prompts, said = [], _Remarks()
    for example in examples:
        if chat and example.messages is None and example.prompt:
            turns = ({"role": "user", "content": example.prompt},)
            example = replace(example, prompt="", messages=turns, learned=())
        if example.messages is None:
            ids = list(tokenizer(example.prompt, verbose=False)["input_ids"])
            if not example.prompt:
                if text_tokens is None:
                    raise DataError(
                        f"{example.source} is plain text or has an empty prompt, and there is "
                        "nothing to answer; give prompts, or take the text for one (--columns "
                        "prompt=text)"
                    )
                ids = [token for part, _ in _runs(example, tokenizer)[0] for token in part]
                ids = ids[: max(1, min(len(ids), text_tokens) // 2)]
            prompts.append(ids)
            continue
        rendered = render(example, tokenizer)
        prompts.append([token for text in rendered.prompt for token in _ids(text, tokenizer)])
        said.hear(rendered)
    said.say(examples, [])
    return prompts


class _Remarks:
    """Count what chat templates do to chats."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.unshown: Counter[str] = Counter()

    def hear(self, rendered: Rendered | None) -> None:
        """Count one chat."""
        if rendered is not None:
            self.count["rewriting"] += rendered.rewritten > 0
            self.count["rewritten"] += rendered.rewritten
            self.count["headless"] += rendered.headless
            self.count["trailing"] += rendered.trailing > 0
            self.unshown.update(rendered.unshown)

    def say(self, examples: Sequence[Example], words: list[str]) -> None:
        """Log one line, if there is anything to say."""
        count = self.count
        remarks = {
            "rewritten": f"in {count['rewriting']} the chat template rewrites assistant turns once "
            f"the chat goes on, so {count['rewritten']} of them are context and not learned",
            "headless": f"in {count['headless']} the answer does not begin as the template's "
            "generation prompt does, and is learned from where they part",
            "trailing": f"{count['trailing']} go on after the last turn to learn, and are read up "
            "to it",
        }
        words += [text for name, text in remarks.items() if count[name]]
        if self.unshown:
            words.append(f"the chat template does not write {named_counts(self.unshown)}")
        if words:
            about = f"of {len(examples)} examples ({examples[0].source} and after)"
            say_once(f"{about} {'; '.join(words)}")


def _runs(example: Example, tokenizer: Any) -> tuple[list[tuple[list[int], bool]], Rendered | None]:
    """Runs of token ids, each with whether it is completion."""
    rendered = None if example.messages is None else render(example, tokenizer)
    if not (example.completion if rendered is None else rendered.parts):
        raise DataError(f"{example.source} has a prompt and nothing to learn; add a completion")
    if rendered is not None:
        return [(_ids(text, tokenizer), learned) for text, learned in rendered.parts], rendered
    # Start-of-text comes from the tokenizer's own rule, so an empty prompt may not be empty.
    prompt = list(tokenizer(example.prompt, verbose=False)["input_ids"])
    completion = [*_ids(example.completion, tokenizer), tokenizer.eos_token_id]
    return [(prompt, False), (completion, True)], None


def _joined(
    runs: Sequence[tuple[list[int], bool]], max_length: int, rewritten: int
) -> Encoded | None:
    """Put runs together up to the greatest length; ``None`` if no completion is within it."""
    ids = [token for part, _ in runs for token in part]
    mask = [is_completion for part, is_completion in runs for _ in part][:max_length]
    mask[:1] = [False]  # nothing stands before the first token to predict it from
    beyond = max(0, len(ids) - max_length)
    return Encoded(ids[:max_length], mask, beyond, rewritten) if any(mask) else None


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def pad_token_id(tokenizer: Any) -> int:
    """Give the tokenizer's padding id, or its end-of-text id where it has none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
