"""
A chat as text, cut where its assistant turns begin and end.

The tokenizer's chat template renders the whole chat once. A turn is learned where the chat up to
it, and the chat up to it with the template's generation prompt, are both beginnings of that text:
then the model is taught what it is to write, after what it is then shown. Templates that write an
earlier turn otherwise once the chat goes on (thinking is left out, another token ends it) make it
context: learned as it stands there, it would teach what is never to be written. The last turn is
always as the model is to write it.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from melinoe.data.examples import Example
from melinoe.data.turns import Turn
from melinoe.errors import DataError, TokenizerError

# What a chat cannot do without.
_PARTS = {"tools", "tool_calls", "documents"}
_GIVEN = {"tools", "documents"}


@dataclass(frozen=True)
class Rendered:
    """A chat's text."""

    parts: tuple[tuple[str, bool], ...]  # runs of text, each with whether it is completion
    prompt: tuple[str, ...]  # runs of what the last turn is generated from
    rewritten: int = 0  # turns that are context because the template writes them otherwise later
    # The last turn does not begin with all of the generation prompt; it is learned from where the
    # two part.
    headless: bool = False
    trailing: int = 0  # turns after the last one to learn, which are not read
    unshown: frozenset[str] = frozenset()  # fields of the chat that the template does not write


def render(example: Example, tokenizer: Any) -> Rendered:
    """
    Render the chat of *example* up to its last turn to learn, or all of it where there is none.

    DataError where the template refuses the chat, does not write its tools or calls, or rewrites
    what stands before the last turn; TokenizerError where there is none.
    """
    if not tokenizer.chat_template:
        raise TokenizerError(
            f"{example.source} is a chat but the tokenizer has no chat template; "
            "give prompt and completion instead"
        )
    assert example.messages is not None
    learned = example.learned_turns
    turns = list(example.messages[: learned[-1] + 1] if learned else example.messages)
    chat = _Chat(tokenizer, example, turns)
    if not learned:
        return Rendered((), (chat.text(len(turns), prompt=True),), unshown=chat.unshown())
    whole, at, rewritten = chat.text(len(turns)), 0, 0
    parts: list[tuple[str, bool]] = []
    for place in learned[:-1]:
        before, after = chat.text(place, prompt=True), chat.text(place + 1)
        if whole.startswith(after) and after.startswith(before) and len(before) >= at:
            parts += [(whole[at : len(before)], False), (whole[len(before) : len(after)], True)]
            at = len(after)
        else:
            rewritten += 1
    before = chat.text(learned[-1], prompt=True)
    apart = (i for i, (one, two) in enumerate(zip(before, whole, strict=False)) if one != two)
    start = next(apart, min(len(before), len(whole)))
    headless = start < len(before)
    if start < at or (headless and not whole[:start].startswith(chat.text(learned[-1]))):
        raise DataError(
            f"{example.source} cannot be cut into turns because the chat template rewrites what "
            "stands before the last one; give prompt and completion instead"
        )
    parts += [(whole[at:start], False), (whole[start:], True)]
    prompt = (before,) if headless else tuple(text for text, _ in parts[:-1])
    trailing = len(example.messages) - len(turns)
    return Rendered(tuple(parts), prompt, rewritten, headless, trailing, chat.unshown())


class _Chat:
    """Write the beginnings of one chat with a template."""

    def __init__(self, tokenizer: Any, example: Example, turns: Sequence[Turn]) -> None:
        self.tokenizer, self.source = tokenizer, example.source
        self.turns, self.options = turns, example.template
        ours = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - _GIVEN
        if taken := sorted(ours & self.options.keys()):
            raise DataError(
                f"{self.source} sets {taken[0]!r} for its chat template, which is decided here; "
                "remove it"
            )
        self.as_json = any("tool_calls" in turn for turn in turns) and self._wants_json()

    def text(self, count: int, *, prompt: bool = False) -> str:
        """Render the first *count* turns, and the generation prompt if asked for."""
        try:
            return self._render(self.turns[:count], self.options, self.as_json, prompt)
        except Exception as error:  # a template is a program, and fails in ways of its own
            said = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise DataError(
                f"{self.source} is a chat that the chat template refuses ({said}); change the row, "
                "or give prompt and completion instead"
            ) from error

    def unshown(self) -> frozenset[str]:
        """Name the fields without which the text is the same; DataError if tools are among them."""
        names = {key for turn in self.turns for key in turn} - {"role", "content"}
        names |= self.options.keys()
        if not names:
            return frozenset()
        template = self.tokenizer.get_chat_template(tools=self.options.get("tools"))
        # A template that speaks of these writes them; asking costs another rendering.
        names -= {name for name in _PARTS if name in template}
        whole = self._try(self.turns, self.options, self.as_json)
        found = set()
        for name in names:
            turns = [{key: one for key, one in turn.items() if key != name} for turn in self.turns]
            options = {key: one for key, one in self.options.items() if key != name}
            if self._try(turns, options, self.as_json) == whole:
                found.add(name)
        if lost := sorted(found & _PARTS):
            raise DataError(
                f"{self.source} has {lost[0]} that the chat template does not write; use a "
                "tokenizer with a template that does, or remove them"
            )
        return frozenset(found)

    def _wants_json(self) -> bool:
        """Tell whether the template takes a call's arguments as JSON, not as an object."""
        written = self._try(self.turns, self.options, as_json=False)
        if written is None:
            return self._try(self.turns, self.options, as_json=True) is not None
        calls = (call for turn in self.turns for call in turn.get("tool_calls", ()))
        arguments = [_call(call.get("function", call), False).get("arguments") for call in calls]
        return any(isinstance(one, dict) and one and str(one) in written for one in arguments)

    def _try(self, turns: Sequence[Turn], options: Mapping[str, Any], as_json: bool) -> str | None:
        try:
            return self._render(turns, options, as_json, False)
        except Exception:  # `text` says which
            return None

    def _render(
        self, turns: Sequence[Turn], options: Mapping[str, Any], as_json: bool, prompt: bool
    ) -> str:
        if not turns:
            return ""
        chat = [dict(turn) for turn in turns]
        for turn in chat:
            if "tool_calls" in turn:
                turn["tool_calls"] = [_call(call, as_json) for call in turn["tool_calls"]]
        return self.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=prompt, **options
        )


def _call(call: Mapping[str, Any], as_json: bool) -> dict[str, Any]:
    """Give a call with its arguments as an object, or as JSON."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], as_json)}
    arguments = call.get("arguments")
    if isinstance(arguments, Mapping) and as_json:
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if isinstance(arguments, str) and not as_json:
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            return {**call, "arguments": parsed}
    return dict(call)
