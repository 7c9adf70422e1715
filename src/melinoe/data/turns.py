"""
Turns of a chat, out of the spellings that data sets have for them.

A turn has ``role`` and ``content``, or ShareGPT's ``from`` and ``value``. Its content is a string
or a list of text parts. Nulls, with which columns are filled where a turn lacks a key, are as
absent, inside of tools and calls too. ``weight`` 0 or 1, ``train`` and ``training`` say whether an
assistant turn is learned.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from melinoe.errors import DataError

Turn = Mapping[str, Any]

ASSISTANT = "assistant"
_SPEAKERS = {"human": "user", "observation": "tool", "function_response": "tool"}
_SPEAKERS |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), ASSISTANT)
_FROM = ("user", ASSISTANT, "system", "tool")
_LEARNED = ("weight", "train", "training")


def read_turns(value: Any, key: str, source: str) -> tuple[list[Turn], list[int]]:
    """
    Read a list of turns, which stands at *key* of the row at *source*.

    Returns the turns, and the places of the assistant turns that are not marked as context.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise DataError(f'{source} has a "{key}" that is no list of turns; write one, see TRL')
    read = [_turn(one, f'{source} has in "{key}" a turn {at}') for at, one in enumerate(value)]
    return [turn for turn, _ in read], [at for at, (_, learned) in enumerate(read) if learned]


def parse_list(value: Any, what: str) -> list[dict[str, Any]]:
    """
    Read a list of objects, or the JSON of one, as tools and calls are kept; nulls are as absent.

    Each object may be JSON as well. JSON inside of one, as a call's arguments may be, stays a
    string.
    """
    try:
        found = json.loads(value) if isinstance(value, str) else value
        items = [json.loads(one) if isinstance(one, str) else one for one in found]
    except (ValueError, TypeError, RecursionError):
        items = [None]
    if not all(isinstance(one, Mapping) for one in items):
        raise DataError(f"{what} that are no list of objects; write one, or its JSON")
    return [without_nulls(one) for one in items]


def without_nulls(value: Any) -> Any:
    """Leave out every key whose value is null, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list | tuple) else value


def _turn(value: Any, what: str) -> tuple[Turn, bool]:
    """Read a turn, and whether it is learned."""
    if not isinstance(value, Mapping):
        raise DataError(f'{what} that is no object; give it "role" and "content"')
    turn = {str(key): one for key, one in value.items() if one is not None}
    if "role" not in turn and "from" in turn:
        speaker = turn.pop("from")
        turn["role"] = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else None
        if turn["role"] not in _FROM:
            raise DataError(
                f'{what} from {speaker!r}; name one of {", ".join(_FROM)} as its "role"'
            )
    if "content" not in turn and "value" in turn:
        turn["content"] = turn.pop("value")
    role = turn.get("role")
    if not isinstance(role, str):
        raise DataError(f'{what} without a "role" that is a string; add it')
    role = turn["role"] = _SPEAKERS[role] if role in ("human", "gpt") else role
    calls = parse_list(turn.pop("tool_calls", []), f'{what} with "tool_calls"')
    if "content" in turn:
        turn["content"] = _content(turn["content"], what)
    elif not calls:
        raise DataError(f'{what} without a "content"; add it')
    turn |= {"tool_calls": calls} if calls else {}
    marks = {key: turn.pop(key) for key in _LEARNED if key in turn}
    for key, mark in marks.items():
        if not isinstance(mark, bool | int | float) or mark not in (0, 1):
            raise DataError(
                f'{what} with a "{key}" of {mark!r}; only 0 and 1, false and true, are read'
            )
    if any(marks.values()) and role != ASSISTANT:
        raise DataError(
            f"{what} of {role!r} that is marked to be learned; only assistant turns can be"
        )
    return turn, role == ASSISTANT and all(marks.values())


def says_something(turn: Turn) -> bool:
    """Tell whether a turn has words or calls of functions."""
    return bool(turn.get("tool_calls") or turn.get("content", "").strip())


def _content(value: Any, what: str) -> str:
    """Read a turn's content: a string, or text parts, which are joined as templates do."""
    texts = []
    for part in [value] if isinstance(value, str) else value if _is_list(value) else [None]:
        if isinstance(part, Mapping):
            found = {str(key): one for key, one in part.items() if one is not None}
            kind = found.get("type", "text")
            if kind != "text" or not isinstance(found.get("text"), str):
                raise DataError(
                    f"{what} with content of type {kind!r} that is no text; remove it, for only "
                    "text can be read here"
                )
            part = found["text"]
        if not isinstance(part, str):
            raise DataError(f'{what} whose "content" is neither a string nor a list of text parts')
        texts.append(part)
    return "".join(texts)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
