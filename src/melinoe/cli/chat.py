"""`melinoe chat`: talk with a model in the terminal."""

import sys
from typing import Annotated, Any

from melinoe.cli import models, options, output
from melinoe.cli.command import option

_HELP = "/clear begins anew, /system TEXT too, with that system message, /cost shows the last "
_HELP += "answer's cost, /exit ends."


@options.serving()
def command(
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
    messages = _opening(system)
    cost = "nothing was answered yet"
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    while (line := _read()) not in (None, "/exit", "/quit"):
        if not line:
            continue
        if line == "/clear" or line.startswith("/system "):
            system = line.removeprefix("/system ").strip() if line != "/clear" else system
            messages = _opening(system)
        elif line.startswith("/"):
            output.say(cost if line == "/cost" else _HELP)
        else:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                chat = Example("", "", "the chat", messages=tuple(asked), learned=())
                answer = generate(
                    loaded,
                    handle,
                    tokenizer,
                    encode_prompts([chat], tokenizer)[0],
                    max_new_tokens=max_new_tokens,
                    streamer=streamer,
                    **models.sampling(temperature),
                )
            except KeyboardInterrupt:  # ends the answer, not the chat
                output.say("\ninterrupted")
                continue
            except MelinoeError as error:
                output.say(str(error))
                continue
            messages = [*asked, {"role": "assistant", "content": answer.text}]
            counters = answer.counters
            assert counters is not None
            cost = (
                f"hit rate {counters.hit_rate('completion') or 0:.3f}  "
                f"{counters.transfers_per_token() or 0:.2f} expert loads a token  "
                f"first token {answer.ttft_s:.2f} s  {answer.tokens_per_s:.1f} tokens/s"
            )


def _opening(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _read() -> str | None:
    """Read a line; None at the end of the input; DataError where it is closed or no text."""
    from melinoe.errors import DataError

    if sys.stdin is None:
        raise DataError("standard input is closed; leave it open, or use melinoe generate")
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"standard input is not UTF-8 text (byte 0x{byte:02x}); convert it"
        ) from None
