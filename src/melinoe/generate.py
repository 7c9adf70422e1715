"""
Prompt to text on a model that runs with few resident experts, and what each call cost.

transformers' own `generate` does the work. Around it: a prefetcher is asked what to load ahead, and
a stopping criterion that never stops takes the time of each token.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from melinoe.cache.counters import Counters
from melinoe.cache.prefetch import Prefetcher
from melinoe.cache.trace import Trace
from melinoe.data import check_text, pad_token_id
from melinoe.engine.handle import Handle
from melinoe.errors import AttachError, DataError, TokenizerError
from melinoe.moe.finite import GREEDY, generate_finite

Prompt = str | Sequence[int]

_log = logging.getLogger("melinoe")
# Below it logits divided by a temperature may be beyond float32, and one token has all of the odds.
_COLDEST = 1e-5


@dataclass(frozen=True)
class Generation:
    """One prompt's answer and its cost."""

    text: str  # what was generated, without special tokens
    ids: list[int]  # generated token ids, end-of-text included if it was reached
    prompt_ids: list[int]  # the prompt's token ids
    counters: Counters | None  # of this call alone; ``None`` for a plain model
    # From the call to the first new token, seconds; waiting for other threads' texts left out.
    ttft_s: float
    seconds: float  # from the call to the last new token
    stall_s: float  # waited for experts while decoding, the prompt's forward pass left out

    @property
    def tokens_per_s(self) -> float:
        """New tokens over all of the call's time, prompt and predictor included."""
        return len(self.ids) / self.seconds


class _Watch(StoppingCriteria):
    """Notes when the first and the latest token came."""

    def __init__(self, device: torch.device, handle: Handle | None) -> None:
        self.device, self.handle = device, handle
        self.first_s = self.last_s = 0.0
        self.stall_at_first_s = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.last_s = time.perf_counter()
        if not self.first_s:
            self.first_s = self.last_s
            if self.handle is not None:
                self.stall_at_first_s = self.handle.stall_s
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; ids pass through. DataError: nothing comes out, or it is no text."""
    if isinstance(prompt, str):
        check_text(prompt, "the prompt")
    ids = list(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise DataError(
            "the prompt is empty and the tokenizer adds no start-of-text token; write a prompt"
        )
    return ids


def generate(
    model: Any,
    handle: Handle | None,
    tokenizer: Any,
    prompt: Prompt,
    max_new_tokens: int = 64,
    streamer: Any = None,
    *,
    prefetch: Prefetcher | None = None,
    **sampling: Any,
) -> Generation:
    """
    Answer one prompt, greedily unless *sampling* says else, whatever the checkpoint's own
    generation settings are. It ends where the model's context does.

    Args:
        handle: What `attach` or `load` gave for *model*; ``None`` for a plain one.
        prompt: Text, or token ids.
        streamer: Gets tokens as they come; see transformers.
        prefetch: What is loaded ahead of need, and when; see `melinoe.cache.prefetch`.
        sampling: For transformers' `generate`: ``do_sample``, ``temperature``, ``top_p``, …

    Raises:
        DataError, TokenizerError: a prompt that is no text, or has ids the model does not know.
        ModelError: the logits are no numbers; or the predictor belongs to another model.
        AttachError: a prefetch without a handle to load through.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    if prefetch is not None:
        if handle is None:
            raise AttachError(
                "a prefetch needs a handle to load through; attach one, or leave it out"
            )
        prefetch.bind(model, tokenizer)
    ids = prompt_ids(tokenizer, prompt)
    _check_ids(model, ids)
    max_new_tokens = _within_context(model, len(ids), max_new_tokens)
    if (heat := sampling.get("temperature")) is not None and heat < _COLDEST:
        sampling |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    device = model.get_input_embeddings().weight.device
    options: dict[str, Any] = {} if sampling.get("do_sample") else {**GREEDY}
    options["pad_token_id"] = pad_token_id(tokenizer)
    watch = _Watch(device, handle)
    before = None
    input_ids = torch.tensor([ids], device=device)

    with ExitStack() as stack:
        if handle is not None:  # all of it is one text's, so other threads wait
            stack.enter_context(handle.lock)
            before = handle.counters
        start_s = time.perf_counter()
        if prefetch is not None and handle is not None:
            stack.enter_context(handle.prefetching(prefetch, ids))
        stack.enter_context(torch.inference_mode())
        output = generate_finite(
            model,
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            stopping_criteria=StoppingCriteriaList([watch]),
            streamer=streamer,
            **(options | sampling),
        )
        counters = handle.counters.minus(before) if handle is not None and before else None
        stall_s = handle.stall_s if handle is not None else 0.0
    new = output[0, len(ids) :].tolist()
    return Generation(
        text=tokenizer.decode(new, skip_special_tokens=True),
        ids=new,
        prompt_ids=ids,
        counters=counters,
        ttft_s=watch.first_s - start_s,
        seconds=watch.last_s - start_s,
        stall_s=stall_s - watch.stall_at_first_s,
    )


def trace_prompts(
    model: Any,
    handle: Handle,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 64,
    progress: Callable[[str], None] | None = None,
    *,
    prefetch: Prefetcher | None = None,
    **sampling: Any,
) -> Trace:
    """
    Generate from each prompt in turn, and record which experts every token chose.

    One sequence per prompt, in order, batch 1; any number of slots gives the same trace if choices
    are exact. *progress* is told in words after each tenth. Other arguments as in `generate`.
    """
    if not prompts:
        raise DataError("there are no prompts to trace; give at least one")
    step = max(1, len(prompts) // 10)
    with handle.record() as recorder:
        for number, prompt in enumerate(prompts, start=1):
            generate(
                model, handle, tokenizer, prompt, max_new_tokens, prefetch=prefetch, **sampling
            )
            if progress is not None and (number % step == 0 or number == len(prompts)):
                progress(f"traced {number} of {len(prompts)} prompts")
    return recorder.trace()


def context_of(model: Any) -> int | None:
    """Give the tokens of a text that *model* was made for; None if its config does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _within_context(model: Any, prompt_tokens: int, max_new_tokens: int) -> int:
    """Give the new tokens that the context leaves, if any; else all, which will mean little."""
    context = context_of(model)
    if context is None or prompt_tokens + max_new_tokens <= context:
        return max_new_tokens
    if context > prompt_tokens:
        return context - prompt_tokens
    _log.warning(
        "the prompt has %d tokens and the model's context is %d: what follows means little",
        prompt_tokens,
        context,
    )
    return max_new_tokens


def _check_ids(model: Any, ids: Sequence[int]) -> None:
    known = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= known:
        raise TokenizerError(
            f"the prompt has token id {max(ids)} but the model knows {known} tokens; "
            "use the model's own tokenizer"
        )
