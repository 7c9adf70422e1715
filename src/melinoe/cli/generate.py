"""`melinoe generate` writes text with few experts resident; `melinoe chat` talks in a terminal."""

import sys
from typing import Annotated, Any

import typer

from melinoe.cli import models, options, output
from melinoe.cli.command import option

_LONGEST_PROMPT_BYTES = 16 << 20  # far beyond any context; a stream may have no end
_HELP = "/clear begins anew, /system TEXT too, with that system message, /cost shows the last "
_HELP += "answer's cost, /exit ends."


@options.serving()
def command(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    max_new_tokens: options.NewTokens = 64,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    raw: options.Raw = False,
    as_json: options.AsJson = False,
    prefetch: options.Prefetch = None,
    predictor: options.PredictorDir = None,
    popularity: options.PopularityFile = None,
    *,
    given: dict[str, Any],
) -> None:
    """Write text with few experts resident: the text to stdout, its cost to stderr."""
    import torch
    from transformers import TextStreamer

    from melinoe.data import Example
    from melinoe.generate import generate

    named = None if prefetch is None else [prefetch]
    # What is missing or wrong shows before the model is opened.
    found = models.prefetchers(named, predictor, popularity, several=False)
    ((name, ahead),) = found.items()
    text = _read_prompt() if prompt == "-" else prompt
    loaded, handle, tokenizer = models.open_model(model, given)
    asked: Any = text
    if tokenizer.chat_template and not raw:
        (asked,) = models.prompt_ids([Example(text, "", "the prompt")], tokenizer, raw)
    torch.manual_seed(seed)
    shown = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    how: dict[str, Any] = {"prefetch": ahead, **_sampling(temperature)}
    how["streamer"] = None if as_json else shown
    result = generate(loaded, handle, tokenizer, asked, max_new_tokens, **how)
    cost = _cost(handle, result, given["choice"], name)
    if as_json:
        output.show_json({"prompt": text, "text": result.text, "ids": result.ids, **cost})
    else:
        output.say(_in_words(cost))


@options.serving()
def chat(
    model: options.Model,
    system: Annotated[str | None, option("System message of the chat.")] = None,
    max_new_tokens: options.NewTokens = 512,
    temperature: options.Temperature = 0.0,
    chat_template: options.ChatTemplate = None,
    *,
    given: dict[str, Any],
) -> None:
    """Talk with a model in the terminal, with few experts resident."""
    from transformers import TextStreamer

    from melinoe.data import Example, encode_prompts
    from melinoe.errors import MelinoeError, TokenizerError
    from melinoe.generate import generate

    loaded, handle, tokenizer = models.open_model(model, given, chat_template=chat_template)
    if not tokenizer.chat_template:
        raise TokenizerError(
            f"{model} has no chat template; name one with --chat-template FILE or plain, or "
            "use melinoe generate"
        )
    output.say(_HELP)

    def opening() -> list[dict[str, str]]:
        return [{"role": "system", "content": system}] if system else []

    messages, cost = opening(), "nothing was answered yet"
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    how: dict[str, Any] = {"streamer": streamer, **_sampling(temperature)}
    while (line := _read_line()) not in (None, "/exit", "/quit"):
        if not line:
            continue
        if line == "/clear" or line.startswith("/system "):
            system = line.removeprefix("/system ").strip() if line != "/clear" else system
            messages = opening()
        elif line.startswith("/"):
            output.say(cost if line == "/cost" else _HELP)
        else:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                turns = Example("", "", "the chat", messages=tuple(asked), learned=())
                (ids,) = encode_prompts([turns], tokenizer)
                answer = generate(loaded, handle, tokenizer, ids, max_new_tokens, **how)
            except KeyboardInterrupt:  # ends the answer, not the chat
                output.say("\ninterrupted")
                continue
            except MelinoeError as error:
                output.say(str(error))
                continue
            messages = [*asked, {"role": "assistant", "content": answer.text}]
            cost = _in_words(_cost(handle, answer, given["choice"], "none"))


def _sampling(temperature: float) -> dict[str, Any]:
    """Give what transformers' `generate` takes to sample at *temperature*; greedy at 0."""
    return {"do_sample": True, "temperature": temperature} if temperature else {}


def _cost(handle: Any, result: Any, choice: str, prefetch: str) -> dict[str, Any]:
    """Give what a text cost: memory, hits and loads, and time."""
    counters, by_layer = result.counters, handle.slots_by_layer
    return {
        "slots": handle.slots,
        **({"slots_by_layer": list(by_layer)} if len(set(by_layer)) > 1 else {}),
        "expert_memory_bytes": handle.expert_memory_bytes,
        "choice": choice,
        "changed_choices": handle.changed_choices,
        "hit_rate": counters.hit_rate("completion"),
        "transfers_per_token": counters.transfers_per_token(),
        "computed_there_per_token": counters.on_host_per_token(),
        "prefetch": prefetch,
        "prefetch_per_token": counters.prefetch_per_token(),
        "adjusted_hit_rate": counters.adjusted_hit_rate("completion"),
        "ttft_s": result.ttft_s,
        "tokens_per_s": result.tokens_per_s,
    }


def _in_words(cost: dict[str, Any]) -> str:
    """Say the cost in a line; --json has all of it."""
    parts = [
        f"{cost['tokens_per_s']:.3g} tokens/s, the first after {cost['ttft_s']:.2g} s",
        f"{cost['slots']} experts of each layer resident",
    ]
    if cost["hit_rate"] is not None:
        parts.append(f"hit rate {cost['hit_rate']:.1%}")
    for name, words in (
        ("transfers_per_token", "experts loaded for each token"),
        ("computed_there_per_token", "computed on the CPU for each token"),
        ("prefetch_per_token", f"loaded ahead for each token ({cost['prefetch']})"),
        ("changed_choices", "choices changed"),
    ):
        if cost[name] or name == "transfers_per_token":
            parts.append(f"{cost[name] or 0:.3g} {words}")
    return "; ".join(parts)


def _read_prompt() -> str:
    """
    Read the prompt from standard input, as UTF-8 whatever the locale is.

    Raises:
        DataError: it is closed, empty, no text, or longer than any prompt.
    """
    from melinoe.errors import DataError

    way_out = "write the prompt to it, or give it as an argument"
    if sys.stdin is None:
        raise DataError(f"standard input is closed; {way_out}")
    try:
        given = sys.stdin.buffer.read(_LONGEST_PROMPT_BYTES + 1)
        if len(given) > _LONGEST_PROMPT_BYTES:
            raise DataError(
                f"standard input holds more than {_LONGEST_PROMPT_BYTES >> 20} MiB, which is no "
                "prompt; write less to it"
            )
        text = given.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"standard input cannot be read ({error.strerror}); {way_out}") from None
    except UnicodeDecodeError as error:
        raise _no_text(error, f" at place {error.start}") from None
    if not text.strip():
        raise DataError(f"standard input is empty; {way_out}")
    return text


def _read_line() -> str | None:
    """Read a line; None at the end of the input; DataError where it is closed or no text."""
    from melinoe.errors import DataError

    if sys.stdin is None:
        raise DataError("standard input is closed; leave it open, or use melinoe generate")
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise _no_text(error) from None


def _no_text(error: UnicodeDecodeError, place: str = "") -> Exception:
    from melinoe.errors import DataError

    byte = error.object[error.start]
    return DataError(f"standard input is not UTF-8 text (byte 0x{byte:02x}{place}); convert it")
