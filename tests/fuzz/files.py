"""Damage files: bytes flipped, cut, doubled; values of JSON replaced by others."""

import json
import random

HOSTILE_JSON = [
    None, -1, 0, 1e308, 10**40, "", "nan", "\ud800", [], {}, [[]], True, float("nan"), "x" * 5000,
    [1, 2, 3], {"a": {"b": []}},
]  # fmt: skip


def damage(content: bytes, seed: int) -> bytes:
    """Change *content* in one way of several, decided by *seed*."""
    rng = random.Random(seed)
    ways = [_flip, _cut, _insert, _double, _blank]
    if content[:1] in (b"{", b"["):
        ways += [_json, _json, _json]
    return rng.choice(ways)(content, rng)


def _flip(content, rng):
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        if changed:
            changed[rng.randrange(min(len(changed), rng.choice([64, 2000, len(changed)])))] ^= (
                1 << rng.randrange(8)
            )
    return bytes(changed)


def _cut(content, rng):
    return content[: rng.randrange(len(content) + 1)]


def _insert(content, rng):
    at = rng.randrange(len(content) + 1)
    more = rng.choice([b"\0", b"\xff\xfe", b"\n\n", b"}", b"9" * 300, b"\xed\xa0\x80", b"[" * 3000])
    return content[:at] + more + content[at:]


def _double(content, rng):
    at = rng.randrange(len(content) + 1)
    return content[:at] + content[at // 2 :]


def _blank(content, rng):
    at = rng.randrange(len(content) + 1)
    return content[:at] + bytes(len(content) - at)


def _json(content, rng):
    """Replace, drop or add one value, anywhere in the first document."""
    try:
        document = json.loads(content)
    except ValueError:
        lines = content.splitlines()
        if not lines:
            return content
        at = rng.randrange(len(lines))
        try:
            lines[at] = json.dumps(_changed(json.loads(lines[at]), rng)).encode()
        except ValueError:
            lines[at] = lines[at][::-1]
        return b"\n".join(lines)
    return json.dumps(_changed(document, rng)).encode()


def _changed(document, rng):
    spots = list(_spots(document))
    if not spots:
        return rng.choice(HOSTILE_JSON)
    holder, key = rng.choice(spots)
    if rng.random() < 0.25:
        del holder[key]
    else:
        holder[key] = rng.choice(HOSTILE_JSON)
    return document


def _spots(value):
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _spots(inner)
