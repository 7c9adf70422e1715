"""Let a model complete prompts: greedily, in batches, each ended where an answer ends."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from melinoe.data import Example, encode_prompts, pad_token_id
from melinoe.errors import DataError
from melinoe.generate import context_of
from melinoe.moe.finite import GREEDY, generate_finite

log = logging.getLogger(__name__)

# In a few-shot-like text the next question follows the answer; nothing after it belongs to it.
NEXT_QUESTION = "Question:"


def reference(example: Example) -> str:
    """Return the right completion: a chat's last turn, a question's answer, a completion."""
    if example.messages is not None:
        last = example.messages[example.learned_turns[-1]] if example.learned_turns else {}
        if "content" not in last:
            raise DataError(
                f"{example.source} ends without an answer in words to compare with; leave it out"
            )
        return last["content"].strip()
    if not (example.prompt and example.completion):
        raise DataError(
            f"{example.source} is plain text without a prompt to complete, or a prompt without a "
            "completion; measure its perplexity alone, or give both"
        )
    return (example.completion if example.answer is None else example.answer).strip()


def complete(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    max_new_tokens: int = 256,
    batch_size: int = 8,
    progress: Callable[[str], None] | None = None,
) -> list[str]:
    """
    Write the completion of each example's prompt, greedily.

    A completion ends at end-of-text, before the next ``Question:`` where the example is a
    question, after *max_new_tokens*, or where the model's context ends, whichever comes first.
    Prompts of similar length share a batch, padded on the left; what shares a batch changes
    results only in rounding. *progress* is told in words after each tenth of the prompts.

    Raises:
        DataError: no examples, an empty prompt, or one that fills the model's context.
        TokenizerError: chats but no chat template.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError("max_new_tokens and batch_size must be 1 or more")
    if not examples:
        raise DataError("there are no prompts to complete; give at least one example")
    prompts = encode_prompts(examples, tokenizer)
    room = _room(model, examples, prompts, max_new_tokens)
    texts = [""] * len(examples)
    done, step = 0, max(1, len(examples) // 10)
    for indices in _batches(examples, prompts, batch_size):
        stops = [NEXT_QUESTION] if examples[indices[0]].answer is not None else []
        new_tokens = min(room[index] for index in indices)
        written = _generate(model, tokenizer, [prompts[i] for i in indices], new_tokens, stops)
        for index, text in zip(indices, written, strict=True):
            texts[index] = text.partition(NEXT_QUESTION)[0] if stops else text
        before, done = done, done + len(indices)
        if progress is not None and (done // step > before // step or done == len(examples)):
            progress(f"completed {done} of {len(examples)} prompts")
    return texts


def _room(
    model: Any, examples: Sequence[Example], prompts: Sequence[list[int]], max_new_tokens: int
) -> list[int]:
    """Tokens that each prompt may get within the model's context."""
    context = context_of(model)
    room = []
    for example, prompt in zip(examples, prompts, strict=True):
        if not prompt:
            raise DataError(
                f"{example.source} has an empty prompt and the tokenizer adds no start-of-text "
                "token; write a prompt"
            )
        left = max_new_tokens if context is None else min(max_new_tokens, context - len(prompt))
        if left < 1:
            raise DataError(
                f"{example.source} has a prompt of {len(prompt)} tokens and the model's context "
                f"is {context}; leave it out, or shorten it"
            )
        room.append(left)
    if short := sum(left < max_new_tokens for left in room):
        log.warning(
            "%d of %d prompts leave less than %d tokens of the model's context of %s; their "
            "batches end where it does",
            short,
            len(room),
            max_new_tokens,
            context,
        )
    return room


def _batches(
    examples: Sequence[Example], prompts: Sequence[list[int]], batch_size: int
) -> Iterator[list[int]]:
    """Indices in batches: questions apart from the rest, the longest prompts first."""
    for is_question in (True, False):
        chosen = [i for i, one in enumerate(examples) if (one.answer is not None) is is_question]
        # The longest first: if memory is short, that shows at once.
        chosen.sort(key=lambda i: -len(prompts[i]))
        for start in range(0, len(chosen), batch_size):
            yield chosen[start : start + batch_size]


class _Written(StoppingCriteria):
    """Ends a row once it holds a text; unlike stop strings, with any tokenizer."""

    def __init__(self, text: str, tokenizer: Any, prompt_tokens: int) -> None:
        self.text, self.tokenizer, self.prompt_tokens = text, tokenizer, prompt_tokens
        # A token has a byte or more; a few more tokens for what stands around the text.
        self.window = len(text.encode()) + 4

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        start = max(self.prompt_tokens, input_ids.shape[1] - self.window)
        tails = self.tokenizer.batch_decode(input_ids[:, start:])
        return torch.tensor([self.text in tail for tail in tails], device=input_ids.device)


def _generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], new_tokens: int, stops: list[str]
) -> list[str]:
    device = model.get_input_embeddings().weight.device
    longest, pad = max(map(len, prompts)), pad_token_id(tokenizer)
    input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    with torch.inference_mode():
        output = generate_finite(
            model,
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=new_tokens,
            pad_token_id=pad,
            **GREEDY,
            stopping_criteria=StoppingCriteriaList(
                [_Written(stop, tokenizer, longest) for stop in stops]
            ),
        )
    return tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
