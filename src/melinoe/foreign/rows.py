"""
Rows of choices put together: a trace where they say in which order tokens were computed.

Rows are arrays by name, one entry for each token and layer: ``number`` (of the row in its file),
``layer``, ``experts`` (rows, k), and, where the file has them, ``token``, ``sequence``, ``kind``,
``forward``, ``scores`` (rows, k), ``count`` and ``rank``.
"""

import numpy as np

from melinoe.cache.trace import COMPLETION_ROW, PADDING_ROW, PROMPT_ROW, Trace

Rows = dict[str, np.ndarray]

# Tokens that choose alike in every layer from the first one on are a warm-up from so many on.
_WARM_UP = 16
_COUNTED = "import it with --statistics, which needs no order"


def gathered(rows: Rows) -> Rows:
    """
    Put choices that stand in rows of their own, of one token and layer, into one row.

    Raises:
        ValueError: a token makes more choices than any model allows.
    """
    keys = [rows[name] for name in ("layer", "token", "sequence", "forward") if name in rows]
    if "rank" in rows:
        order = np.lexsort([rows["rank"], *keys])
        if _changes([key[order] for key in (rows["rank"], *keys)]).all():  # no numbering restarts
            rows = {name: values[order] for name, values in rows.items()}
            keys = [key[order] for key in keys]
    first = _changes(keys)
    if "rank" in rows:
        first[1:] |= np.diff(rows["rank"]) <= 0
    starts = np.flatnonzero(first)
    row = np.cumsum(first) - 1
    place = np.arange(len(first)) - starts[row]
    found = {name: values[starts] for name, values in rows.items()}
    for name, none in (("experts", -1), ("scores", 0)):
        if name in rows:
            found[name] = np.full((len(starts), place.max() + 1), none, rows[name].dtype)
            found[name][row, place] = rows[name][:, 0]
    return found


def counts_of(rows: Rows, num_experts: int, notes: list[str]) -> np.ndarray:
    """
    Count how often each expert was chosen, padding left out.

    Returns:
        float64 (layers, num_experts); only layers that a row names.
    """
    layers, at = np.unique(rows["layer"], return_inverse=True)
    kept = rows["kind"] != PADDING_ROW if "kind" in rows else np.ones(len(at), bool)
    if "token" in rows and "kind" not in rows:
        by_layer = [np.flatnonzero(at == layer) for layer in range(len(layers))]
        alike = min(_alike(rows["experts"][mine]) for mine in by_layer)
        if alike >= _WARM_UP:
            kept[np.concatenate([mine[:alike] for mine in by_layer])] = False
            notes.append(_warm_up(alike))
    experts = rows["experts"]
    chosen = (experts >= 0) & kept[:, None]
    weights = rows.get("count", np.ones(len(at)))[:, None] * chosen
    cells = (at[:, None] * num_experts + experts)[chosen]
    counts = np.bincount(cells, weights[chosen], len(layers) * num_experts)
    return counts.reshape(len(layers), num_experts)


def trace_of(rows: Rows, num_experts: int, model: str, note: str, notes: list[str]) -> Trace:
    """
    Put rows in the order in which their tokens were computed.

    Args:
        rows: With ``token``.
        num_experts: Experts of each layer.
        model, note: For people.
        notes: What is assumed or left out is added here.

    Raises:
        ValueError: the rows do not say that order, or contradict themselves; the sentence names a
            row and a way that works.
        TraceError: the arrays are no trace.
    """
    layers, at = np.unique(rows["layer"], return_inverse=True)
    if layers[-1] != len(layers) - 1:
        notes.append(f"layers {', '.join(map(str, layers))} are numbered from 0, without gaps")
    rows = _in_order(rows | {"layer": at}, len(layers))
    first = {name: values[:: len(layers)] for name, values in rows.items()}
    for name in ("sequence", "kind", "forward"):
        if name in rows:
            differ = rows[name] != np.repeat(first[name], len(layers))
            if differ.any():
                number = rows["number"][np.argmax(differ)]
                raise ValueError(f"row {number} has another {name} than its token's first layer")
    _no_choice_twice(rows)
    shape = (-1, len(layers), rows["experts"].shape[1])
    experts, scores = rows["experts"].reshape(shape), rows.get("scores")
    scores = None if scores is None else np.where(experts < 0, 0, scores.reshape(shape))
    if "kind" not in first:
        alike = _alike(experts)
        if "forward" in first:  # whole passes
            ends = np.append(np.flatnonzero(_changes([first["forward"]])), len(experts))
            alike = int(ends[ends <= alike].max())
        if alike >= _WARM_UP:
            notes.append(_warm_up(alike))
            first = {name: values[alike:] for name, values in first.items()}
            experts, scores = experts[alike:], None if scores is None else scores[alike:]
            if not len(experts):
                raise ValueError("nothing else is in it; record while requests are served")
    sequence, kind, forward = _whose(first, notes)
    return Trace(
        experts.astype(np.int16),
        np.unique(forward, return_inverse=True)[1].astype(np.int32),
        np.unique(sequence, return_inverse=True)[1].astype(np.int32),
        kind.astype(np.uint8),
        num_experts,
        model,
        note="; ".join([note, *notes]),
        scores=scores,
    )


def _changes(keys: list[np.ndarray]) -> np.ndarray:
    """Mark entries in which an array differs from the one before; the first is marked."""
    changed = np.ones(len(keys[0]), bool)
    changed[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return changed


def _alike(choices: np.ndarray) -> int:
    """How many tokens from the first on choose as the first."""
    other = (choices != choices[:1]).reshape(len(choices), -1).any(axis=1)
    return int(np.argmax(other)) if other.any() else len(choices)


def _warm_up(tokens: int) -> str:
    return f"the first {tokens} tokens choose alike in every layer, as a warm-up does: left out"


def _in_order(rows: Rows, layers: int) -> Rows:
    """
    Sort rows by token and layer, so that every token has each layer once.

    Tokens are told apart by the first of these that does: their number; sequence and number;
    forward pass and number; and passes that begin wherever the numbers do not go on.
    """
    token, layer = rows["token"], rows["layer"]
    ways: list[list[np.ndarray]] = [[token]]
    ways += [[rows[name], token] for name in ("sequence", "forward") if name in rows]
    if "forward" not in rows:
        mine = np.flatnonzero(layer == layer[0])
        begins = np.zeros(len(token), np.int64)
        begins[mine[1:]] = np.diff(token[mine]) <= 0
        ways.append([np.cumsum(begins), token])
    for keys in ways:
        order = np.lexsort([layer, *reversed(keys)])
        if not _changes([key[order] for key in (*keys, layer)]).all():
            continue
        if len(keys) > 1 and keys is ways[-1]:
            rows = rows | {"forward": keys[0]}
            if "sequence" in rows and not rows["sequence"].any():
                del rows["sequence"]  # one name for whatever was served tells nothing apart
        rows = {name: values[order] for name, values in rows.items()}
        break
    else:
        raise ValueError(
            "tokens of one number are in the same layer twice; number them on, add a column "
            f"sequence or forward, or {_COUNTED}"
        )
    tokens = np.cumsum(_changes([key[order] for key in keys])) - 1
    expected = np.arange(len(tokens))
    wrong = (tokens != expected // layers) | (rows["layer"] != expected % layers)
    if wrong.any() or len(tokens) % layers:
        number = rows["number"][np.argmax(wrong) if wrong.any() else -1]
        raise ValueError(
            f"a token at row {number} has not every layer; write a row for each of the {layers} "
            f"layers, or {_COUNTED}"
        )
    return rows


def _no_choice_twice(rows: Rows) -> None:
    chosen = np.sort(rows["experts"], axis=1)
    twice = ((chosen[:, 1:] == chosen[:, :-1]) & (chosen[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        number = rows["number"][np.argmax(twice)]
        raise ValueError(
            f"the token at row {number} chooses an expert twice in one layer, so it is several "
            f"tokens of one number; number them on, or {_COUNTED}"
        )


def _whose(rows: Rows, notes: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequence, kind and forward pass of each token; what is not told, as one user's would be."""
    sequence, kind, forward = (rows.get(name) for name in ("sequence", "kind", "forward"))
    tokens = len(rows["token"])
    if forward is None:
        if sequence is None:
            sequence = np.zeros(tokens, np.int64)
            notes.append("nothing says which tokens belong together: taken as one sequence")
        if kind is None:
            kind = np.full(tokens, COMPLETION_ROW)
            notes.append("nothing says which tokens are a prompt's: all taken as completions")
        # A prompt is one pass, and each token of a completion one of its own.
        new = _changes([sequence]) | (kind == COMPLETION_ROW)
        new[1:] |= kind[:-1] == COMPLETION_ROW
        return sequence, kind, np.cumsum(new)
    if (np.diff(forward) < 0).any():
        number = rows["number"][1 + np.argmax(np.diff(forward) < 0)]
        raise ValueError(f"row {number} is of an earlier forward pass than the token before it")
    if sequence is None:
        begins = _changes([forward])
        number = np.cumsum(begins) - 1
        several = np.bincount(number) > 1
        if kind is None and (several[1:] & several[:-1]).any():
            mixed = np.flatnonzero(begins)[1 + np.argmax(several[1:] & several[:-1])]
            raise ValueError(
                f"the passes up to row {rows['number'][mixed]} mix several requests, and nothing "
                "says whose tokens are whose; record one request at a time (in vLLM "
                f"max_num_seqs=1), log a request's id as req_id, or {_COUNTED}"
            )
        starts = several if kind is None else kind[begins] == PROMPT_ROW
        starts[1:] &= ~starts[:-1]
        sequence = np.cumsum(starts)[number]
        notes.append("a pass of several tokens is taken as the prompt that begins a sequence")
    if kind is None:
        # A request's first pass is its prompt, and so is each that reads several of its tokens.
        pairs, at, size = np.unique(
            np.stack([sequence, forward]), axis=1, return_inverse=True, return_counts=True
        )
        prompt = (size > 1) | _changes([pairs[0]])
        kind = np.where(prompt[at.ravel()], PROMPT_ROW, COMPLETION_ROW)
    return sequence, kind, forward
