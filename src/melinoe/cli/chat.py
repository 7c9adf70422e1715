"""`melinoe chat`: talk with a model in the terminal."""

import sys
from typing import Annotated, Any

from melinoe.cli import models, options, output
from melinoe.cli.command import option, with_settings
from melinoe.engine.options import Options

_HELP = "/clear begins anew, /system TEXT too, with that system message, /cost shows the last "
_HELP += "answer's cost, /exit ends."


@with_settings(Options, options.SERVING)
def command(
    model: options.Model,
    system: Annotated[str | None, option("System message of the chat.")] = None,
    max_new_tokens: options.NewTokens = 512,
    temperature: Annotated[
        float, option("Sample at this temperature. 0: take the likeliest token.", min=0)
    ] = 0.0,
    chat_template: Annotated[
        str | None,
        option(
            "A chat template in place of the model's own: a Jinja file, or plain, which writes "
            "`role: text`."
        ),
    ] = None,
    allocate_from: options.AllocateFrom = None,
    choice: options.Choice = "exact",
    choice_strength: options.ChoiceStrength = 0.1,
    choice_keep: options.ChoiceKeep = 1,
    *,
    given: dict[str, Any],
) -> None:
    """Talk with a model in the terminal, with few experts resident."""
    from jinja2 import TemplateError
    from transformers import TextStreamer

    from melinoe.errors import MelinoeError, TokenizerError
    from melinoe.generate import generate

    wanted = models.choice_settings(choice, choice_strength, choice_keep)
    loaded, handle, tokenizer = models.open_model(model, given, allocate_from)
    handle.choose(wanted)
    models.use_chat_template(tokenizer, chat_template)
    if not tokenizer.chat_template:
        raise TokenizerError(
            f"{model} has no chat template; name one with --chat-template FILE or plain, or "
            "use melinoe generate"
        )
    output.say(_HELP)
    messages = _opening(system)
    cost = "nothing was answered yet"
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature else {}
    )
    while (line := _read()) not in (None, "/exit", "/quit"):
        if not line:
            continue
        if line == "/clear":
            messages = _opening(system)
        elif line.startswith("/system "):
            system = line.removeprefix("/system ").strip()
            messages = _opening(system)
        elif line == "/cost":
            output.say(cost)
        elif line.startswith("/"):
            output.say(_HELP)
        else:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                ids = tokenizer.apply_chat_template(
                    asked, add_generation_prompt=True, return_dict=True
                )["input_ids"]
            except TemplateError as error:
                output.say(f"the model's chat template refuses: {error}")
                continue
            try:
                answer = generate(
                    loaded,
                    handle,
                    tokenizer,
                    list(ids),
                    max_new_tokens=max_new_tokens,
                    streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
                    **sampling,
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
    """Read a line; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
