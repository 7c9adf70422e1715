"""
Does a policy that does not know the future close half of the gap between LFU and Belady?

Question: loads a token of a real model's routing, at a quarter and at half of the experts, by rules
that look at the past alone: recency, frequency at several rates of forgetting and two of them added
up, uses over age, popularity counted on other sequences, which experts follow which; with slots
that move between layers; with one or two slots given up for staging places, through which an expert
is computed without being admitted. And how far anything could come: a linear model of all these
numbers, and a network that sees the recent use of every layer, fitted to other sequences to say how
soon an expert is used again.

Every rule is a score of each expert after each token; the lowest leaves. Sequences are halved at
random: one half tunes and fits, the other is judged, each from an empty cache. Belady bounds what
loads on demand can reach (and with staging, Belady that may pass).

The answer that would be bad news: the network closes less than half of the gap. Then no rule that
sees the same choices can be expected to.

Floor: Belady. Not measured: router logits and hidden states, which a trace does not hold; prefetch,
which copies more and not less; time.

    melinoe import-trace ROUTING.parquet --num-experts 32 --out t.safetensors
    python benchmarks/policies.py t.safetensors [--tokens 15000] [--out FILE]

Beside the traces given stands the shipped model, reading answers and six held-out corpora; nothing
is fitted to traces as short as those.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from common import publish

from melinoe.cache.trace import COMPLETION_ROW, Trace
from melinoe.checkpoint import load_tokenizer
from melinoe.data import encode, load_examples
from melinoe.engine.load import load
from melinoe.measure import reading_trace
from melinoe.shipped import GSM8K_TEST, HELD_OUT, TINY_OLMOE
from melinoe.stats import bootstrap, paired_difference

KEPT = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)  # rates of forgetting that the learned ones see
ENOUGH = 20_000  # tokens to fit to
SOON = 0.9  # a use counts so much less for each token that it lies ahead
njit = numba.njit(cache=True)


@njit
def loads_of(experts, begins, scores, slots, staging):  # type: ignore[no-untyped-def]
    """Loads of each token in one layer; scores (tokens, experts) as they are after the token."""
    tokens, top_k = experts.shape
    resident = np.zeros(scores.shape[1], np.bool_)
    needed = np.zeros(scores.shape[1], np.bool_)
    loads, held = np.zeros(tokens, np.int64), 0
    for t in range(tokens):
        if begins[t]:
            resident[:] = False
            held = 0
        needed[:] = False
        for k in range(top_k):
            expert = experts[t, k]
            needed[expert] = True
            if not resident[expert]:
                loads[t] += 1
                resident[expert] = True
                held += 1
        while held > slots - staging:
            victim = -1
            for expert in range(len(resident)):
                # Without staging all that a token needs is resident together.
                if not resident[expert] or (staging == 0 and needed[expert]):
                    continue
                if victim < 0 or scores[t, expert] < scores[t, victim]:
                    victim = expert
            resident[victim] = False
            held -= 1
    return loads


@njit
def pooled_loads_of(experts, begins, scores, slots):  # type: ignore[no-untyped-def]
    """Loads of each token where all layers share the slots, and the lowest of all scores leaves."""
    tokens, layers, top_k = experts.shape
    resident = np.zeros((layers, scores.shape[2]), np.bool_)
    needed = np.zeros(scores.shape[2], np.bool_)
    loads, held = np.zeros(tokens, np.int64), 0
    for t in range(tokens):
        if begins[t]:
            resident[:] = False
            held = 0
        for layer in range(layers):
            needed[:] = False
            for k in range(top_k):
                expert = experts[t, layer, k]
                needed[expert] = True
                if not resident[layer, expert]:
                    loads[t] += 1
                    resident[layer, expert] = True
                    held += 1
            while held > slots:
                worst, at, victim = np.inf, -1, -1
                for other in range(layers):
                    known = t if other <= layer or begins[t] else t - 1  # not yet this token's
                    for expert in range(scores.shape[2]):
                        if resident[other, expert] and (other != layer or not needed[expert]):
                            score = scores[known, other, expert]
                            if score < worst:
                                worst, at, victim = score, other, expert
                resident[at, victim] = False
                held -= 1
    return loads


@njit
def decayed(experts, begins, gamma, num_experts):  # type: ignore[no-untyped-def]
    """Uses so far in the sequence, each counting gamma for every token since."""
    out = np.zeros((len(experts), num_experts), np.float32)
    now = np.zeros(num_experts)
    for t in range(len(experts)):
        if begins[t]:
            now[:] = 0
        now *= gamma
        for expert in experts[t]:
            now[expert] += 1
        out[t] = now
    return out


@njit
def ages(experts, begins, num_experts):  # type: ignore[no-untyped-def]
    """Tokens since the last use, and tokens since the sequence began."""
    out = np.zeros((len(experts), num_experts), np.float32)
    last, place = np.full(num_experts, -(10.0**6)), np.zeros(len(experts), np.float32)
    for t in range(len(experts)):
        if begins[t]:
            last[:] = t - 10.0**6
        place[t] = 1 if begins[t] else place[t - 1] + 1
        for expert in experts[t]:
            last[expert] = t
        for expert in range(num_experts):
            out[t, expert] = t - last[expert]
    return out, place


@njit
def ahead(experts, begins, gamma, num_experts):  # type: ignore[no-untyped-def]
    """Tokens until the next use, and uses to come, each counting gamma for every token until it."""
    waits = np.zeros((len(experts), num_experts), np.float32)
    uses = np.zeros((len(experts), num_experts), np.float32)
    following, now = np.full(num_experts, 10.0**9), np.zeros(num_experts)
    for t in range(len(experts) - 1, -1, -1):
        for expert in range(num_experts):
            waits[t, expert] = following[expert] - t
        uses[t] = now
        now *= gamma
        for expert in experts[t]:
            following[expert] = t
            now[expert] += 1 - gamma
        if begins[t]:
            following[:] = 10.0**9
            now[:] = 0
    return waits, uses


class Half:
    """Sequences of a trace, one layer at a time: their choices, and where each begins."""

    def __init__(self, trace: Trace, sequences: np.ndarray, tokens: int) -> None:
        rows = np.flatnonzero(np.isin(trace.sequence, sequences) & (trace.kind == COMPLETION_ROW))
        rows = rows[np.argsort(trace.sequence[rows], kind="stable")][:tokens]
        self.experts = np.ascontiguousarray(trace.experts[rows].astype(np.int64))
        owner = trace.sequence[rows]
        self.begins = np.append(True, owner[1:] != owner[:-1])
        self.owner = np.cumsum(self.begins) - 1
        self.num_experts, self.num_layers = trace.num_experts, trace.num_layers

    def layer(self, number: int) -> np.ndarray:
        return np.ascontiguousarray(self.experts[:, number])

    def popularity(self) -> np.ndarray:
        """Uses a token, float32 (layers, experts)."""
        counts = [np.bincount(self.layer(n).ravel(), minlength=self.num_experts) for n in
                  range(self.num_layers)]  # fmt: skip
        return (np.array(counts) / len(self.experts)).astype(np.float32)

    def following(self) -> np.ndarray:
        """How much likelier than usual each expert is right after each, (layers, from, to)."""
        out = np.zeros((self.num_layers, self.num_experts, self.num_experts), np.float32)
        inner = ~self.begins[1:]
        for n in range(self.num_layers):
            used = np.zeros((len(self.experts), self.num_experts), np.float32)
            np.put_along_axis(used, self.layer(n), 1, axis=1)
            before, after = used[:-1][inner], used[1:][inner]
            out[n] = before.T @ after / np.maximum(before.sum(0), 1)[:, None] - used.mean(0)
        return out


Rule = Callable[[Half, int], np.ndarray]


def lfu(gamma: float) -> Rule:
    return lambda half, n: decayed(half.layer(n), half.begins, gamma, half.num_experts)


def two_rates(fast: float, slow: float, weight: float) -> Rule:
    return lambda half, n: (
        np.float32(weight * (1 - fast)) * lfu(fast)(half, n)
        + np.float32(1 - slow) * lfu(slow)(half, n)
    )


def lru(half: Half, n: int) -> np.ndarray:
    return -ages(half.layer(n), half.begins, half.num_experts)[0]


def lfru(half: Half, n: int) -> np.ndarray:
    return lfu(1.0)(half, n) / (ages(half.layer(n), half.begins, half.num_experts)[0] + 1)


def belady(half: Half, n: int) -> np.ndarray:
    return -ahead(half.layer(n), half.begins, SOON, half.num_experts)[0]


def rules(tune: Half) -> Iterator[tuple[str, Rule]]:
    """The candidates, cheapest first; what they know beforehand is counted on *tune*."""
    popular, lift = tune.popularity(), tune.following()
    yield "lru", lru
    for gamma in (0.8, 0.9, 0.95, 0.98, 0.99, 1.0):
        yield f"lfu, gamma {gamma}", lfu(gamma)
    yield "lfru", lfru
    yield "static", lambda half, n: np.tile(popular[n], (len(half.experts), 1))
    yield "lfu .95 + popularity", lambda half, n: lfu(0.95)(half, n) + 3 * popular[n]
    for weight in (0.1, 0.25, 0.5):
        yield f"two rates, {weight}", two_rates(0.7, 0.98, weight)

    def transitions(half: Half, n: int) -> np.ndarray:
        soon = lfu(0.9)(half, n) @ lift[n]
        return two_rates(0.7, 0.98, 0.25)(half, n) + np.float32(0.01) * soon

    yield "two rates + transitions", transitions
    yield "belady", belady


# --- how far anything could come ------------------------------------------------------------------


def seen(half: Half) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of each (token, layer, expert) that the past gives; tokens since the beginning."""
    shape = (len(half.experts), half.num_layers, half.num_experts, len(KEPT) + 2)
    out = np.zeros(shape, np.float32)
    for n in range(half.num_layers):
        for at, gamma in enumerate(KEPT):
            out[:, n, :, at] = (1 - gamma) * lfu(gamma)(half, n)
        age, place = ages(half.layer(n), half.begins, half.num_experts)
        out[:, n, :, -2] = lfu(1.0)(half, n) / place[:, None]
        out[:, n, :, -1] = 1 / (age + 1)
    return torch.from_numpy(out), torch.from_numpy(place)


class Learned(torch.nn.Module):
    """
    Say how soon each expert is used again: from what is seen of it, and *hidden* of all layers.

    A layer decides before those behind it have run, so it sees this token in the layers up to its
    own and the token before in the others; *whole* lets it see the whole token, which none can.
    """

    def __init__(self, tune: Half, hidden: int = 0, whole: bool = False) -> None:
        super().__init__()
        layers, experts = tune.num_layers, tune.num_experts
        self.whole = whole
        used = torch.from_numpy(tune.popularity()).clamp(1e-3, 0.99)
        self.bias = torch.nn.Parameter(torch.logit(used))
        self.own = torch.nn.Parameter(torch.zeros(layers, experts, len(KEPT) + 2))
        self.shared = torch.nn.Parameter(torch.zeros(len(KEPT) + 2))
        self.early = torch.nn.Parameter(torch.zeros(len(KEPT) + 2))  # while little is known
        self.into = torch.nn.Parameter(torch.randn(layers, 4 * experts, hidden) * 0.05)
        self.out = torch.nn.Parameter(torch.zeros(layers, hidden, experts))

    def forward(self, x: torch.Tensor, before: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        early = self.early * place.rsqrt()[:, None, None, None]
        logits = self.bias + (x * (self.own + self.shared + early)).sum(-1)
        if not self.out.shape[1]:
            return logits
        now, then = (one[..., (0, 1, 3, 5)].flatten(2) for one in (x, before))
        change = torch.einsum("tlf,lfh->tlh", now - then, self.into)
        change = change.sum(1, keepdim=True) if self.whole else change.cumsum(1)
        inner = torch.einsum("tlf,lfh->th", then, self.into)[:, None] + change
        inner = torch.nn.functional.gelu(inner).expand(-1, x.shape[1], -1)
        return logits + torch.einsum("tlh,lhe->tle", inner, self.out)


def batches(half: Half, x: torch.Tensor, place: torch.Tensor, order: torch.Tensor) -> Iterator[Any]:
    """Rows of 512 tokens, with what was seen at the token before: nothing where a text begins."""
    begins = torch.from_numpy(half.begins)
    for rows in order.split(512):
        before = x[(rows - 1).clamp(0)] * ~begins[rows][:, None, None, None]
        yield rows, (x[rows], before, place[rows])


def learn(model: Learned, tune: Half, epochs: int, rate: float) -> Learned:
    """Fit to the uses to come, by cross entropy."""
    x, place = seen(tune)
    soon = [ahead(tune.layer(n), tune.begins, SOON, tune.num_experts)[1]
            for n in range(tune.num_layers)]  # fmt: skip
    goal = torch.from_numpy(np.stack(soon, axis=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * -(-len(x) // 512)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(epochs):
        for rows, given in batches(tune, x, place, torch.randperm(len(x))):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(*given), goal[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def learned_rules(tune: Half, half: Half) -> Iterator[tuple[str, Rule]]:
    """Fit each and score the judged half with it."""
    torch.manual_seed(0)
    for name, options, epochs, rate in (
        ("linear", {}, 2, 3e-2),
        ("network", {"hidden": 128}, 4, 4e-3),
        ("network that sees the whole token", {"hidden": 128, "whole": True}, 4, 4e-3),
    ):
        model = learn(Learned(tune, **options), tune, epochs, rate)
        x, place = seen(half)
        with torch.inference_mode():
            parts = [model(*given) for _, given in batches(half, x, place, torch.arange(len(x)))]
        scores = torch.cat(parts).numpy()
        yield f"learned, {name}", lambda _, n, known=scores: np.ascontiguousarray(known[:, n])


# --- the table ------------------------------------------------------------------------------------


def judge(half: Half, rule: Rule, slots: int, staging: int) -> np.ndarray:
    """Loads of each sequence, all layers."""
    total = np.zeros(len(half.experts), np.int64)
    for n in range(half.num_layers):
        total += loads_of(half.layer(n), half.begins, rule(half, n), slots, staging)
    return np.bincount(half.owner, total)


def judge_pooled(half: Half, rule: Rule, slots: int) -> np.ndarray:
    """Loads of each sequence where layers share as many slots as they would have apart."""
    scores = np.stack([rule(half, n) for n in range(half.num_layers)], axis=1)
    total = pooled_loads_of(half.experts, half.begins, scores, slots * half.num_layers)
    return np.bincount(half.owner, total)


def table(trace: Trace, tokens: int) -> list[dict[str, Any]]:
    """One row for each rule, number of slots and of staging places."""
    order = np.random.default_rng(0).permutation(np.unique(trace.sequence))
    first, second = np.array_split(order, 2)
    tune, half = Half(trace, first, 2 * tokens), Half(trace, second, tokens)
    every: dict[str, Rule] = dict(rules(tune))
    if len(tune.experts) >= ENOUGH:
        every |= learned_rules(tune, half)
    lengths = np.bincount(half.owner).astype(float)
    staged = ("lfu, gamma 0.95", "belady")
    rows = []
    for share in (0.25, 0.5):
        slots = round(share * trace.num_experts)
        base = judge(half, every["lfu, gamma 0.9"], slots, 0)
        bound = judge(half, every["belady"], slots, 0)
        pool = "lfu, gamma 0.95, slots of all layers"
        for name, rule in {**every, pool: every["lfu, gamma 0.95"]}.items():
            for staging in (0, 1, 2) if name in staged else (0,):
                if name == pool:
                    loads = judge_pooled(half, rule, slots)
                else:
                    loads = judge(half, rule, slots, staging)
                less = paired_difference(loads, base, lengths, lengths)
                rows.append(
                    {
                        "slots": slots,
                        "staging": staging,
                        "policy": name,
                        "loads_per_token": bootstrap(loads, lengths).to_dict(),
                        "minus_lfu": less.to_dict(),
                        "times_belady": loads.sum() / bound.sum(),
                        "gap_closed": (base.sum() - loads.sum()) / (base.sum() - bound.sum()),
                    }
                )
                print(json.dumps(rows[-1]), flush=True, file=sys.stderr)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each rule, of the first trace: what it loads and closes at a quarter and half."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in (row for row in rows if row["trace"] == rows[0]["trace"]):
        key = (row["policy"], row["staging"])
        one = found.setdefault(key, {name: row[name] for name in ("policy", "staging")})
        at = "half" if one.keys() & {"loads_at_a_quarter"} else "a_quarter"
        one[f"loads_at_{at}"] = row["loads_per_token"]
        one[f"gap_closed_at_{at}_percent"] = 100 * row["gap_closed"]
    return list(found.values())


def shipped() -> Iterator[tuple[str, Trace]]:
    """What the shipped model chooses on answers and on the six held-out corpora."""
    model, handle = load(TINY_OLMOE, "cpu", slots=32, dtype=torch.float32)
    tokenizer = load_tokenizer(str(TINY_OLMOE), model.config)
    corpora = sorted(HELD_OUT.glob("*.jsonl"))
    for path, limit in ((Path(GSM8K_TEST), 30), *((one, 6) for one in corpora)):
        encoded = encode(load_examples(str(path), limit=limit), tokenizer, 512)
        yield f"shipped, {path.stem}", reading_trace(model, handle, encoded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("traces", type=Path, nargs="*")
    parser.add_argument("--tokens", type=int, default=15_000, help="judged; twice as many tune")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/policies.json"))
    arguments = parser.parse_args()
    given = [(path.stem, Trace.load(path)) for path in arguments.traces]
    rows = []
    for name, trace in itertools.chain(given, shipped()):
        rows += [{"trace": name, **row} for row in table(trace, arguments.tokens)]
    record = {
        "benchmark": "policies",
        "title": "Loads a token by policies that look at the past, and the gap that they close",
        "result": summary(rows),
        "cells": rows,
        "notes": [
            "Each judged sequence from an empty cache; fitted and counted on other sequences. Gap: "
            "from LFU with gamma 0.9 to Belady, without staging. Staging places count as slots."
        ],
    }
    publish(record, arguments.out)


if __name__ == "__main__":
    main()
