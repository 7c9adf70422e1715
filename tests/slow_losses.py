"""The losses written straight from their formulas: Python loops, float64, one thing at a time."""

import math

import torch


def ids_of(row, num_experts):
    """The experts of one token's choices: ids outside the experts are skip slots."""
    return [e for e in row.tolist() if 0 <= e < num_experts]


def slow_cache_loss(
    logits,
    top_k_index,
    mask,
    capacity,
    gamma,
    *,
    form="clipped",
    num_experts=None,
    denominator=None,
):
    """s(t+1) = gamma s(t) + r(t) token by token; then every expert of every token, one by one."""
    experts = num_experts or logits.shape[-1]
    total, count = logits.new_zeros(()), 0
    for row in range(logits.shape[0]):
        s = [logits.new_zeros(()) for _ in range(experts)]
        for t in range(logits.shape[1]):
            p = logits[row, t].softmax(-1)[:experts]
            chosen = ids_of(top_k_index[row, t], experts)
            r = [float(e in chosen) + (p[e] - p[e].detach()) for e in range(experts)]
            if mask[row, t]:
                missing = missing_of(s, capacity, form)
                for e in range(experts):
                    total = total + r[e] * missing[e]
                count += 1
            s = [gamma * s[e] + r[e].detach() for e in range(experts)]
    return total / (max(1, count) if denominator is None else denominator)


def missing_of(s, capacity, form):
    """1 - c of each expert."""
    if form == "resident":
        ranked = sorted(range(len(s)), key=lambda e: (-float(s[e].detach()), e))
        resident = {e for e in ranked[: int(capacity)] if s[e] > 0}
        return [float(e not in resident) for e in range(len(s))]
    whole = sum(float(one.detach()) for one in s)
    if whole == 0:
        return [1.0] * len(s)
    missing = [1 - capacity * one / sum(s) for one in s]
    if form == "clipped":
        missing = [one if one > 0 else one * 0 for one in missing]
    return missing


def slow_concentration_loss(logits, top_k_index, mask, capacity, *, num_experts=None):
    """Shares of each sequence expert by expert; -log of half a use where an expert has none."""
    experts, top_k = num_experts or logits.shape[-1], top_k_index.shape[-1]
    sequences = {}
    for row in range(logits.shape[0]):
        for t in range(logits.shape[1]):
            if mask[row, t]:
                p = logits[row, t].softmax(-1)[:experts]
                chosen = ids_of(top_k_index[row, t], experts)
                share = [(e in chosen) / max(1, len(chosen)) for e in range(experts)]
                r = torch.stack([share[e] + p[e] - p[e].detach() for e in range(experts)])
                sequences.setdefault(row, []).append(r)

    def entropy(shares, least):
        return -sum(
            u * torch.log(u if float(u.detach()) > least else u * 0 + least) for u in shares
        )

    means = [sum(tokens) / len(tokens) for tokens in sequences.values()]
    half = [0.5 / (len(tokens) * top_k) for tokens in sequences.values()]
    within = [
        torch.relu(entropy(one, least) - math.log(capacity))
        for one, least in zip(means, half, strict=True)
    ]
    together = entropy(sum(means) / len(means), min(half) / len(means))
    return (sum(within) / len(within) + math.log(experts) - together) / math.log(experts)


def slow_rank_loss(logits, base, mask, rho, denominator=None):
    """Every ordered pair of experts, one by one."""
    experts, total, count = logits.shape[-1], logits.new_zeros(()), 0
    for row in range(logits.shape[0]):
        for t in range(logits.shape[1]):
            if not mask[row, t]:
                continue
            p, b = logits[row, t].softmax(-1), base[row, t].softmax(-1)
            for i in range(experts):
                for j in range(experts):
                    if b[i] > b[j]:
                        total = total + torch.relu(rho - (p[i] - p[j]))
            count += 1
    pairs = experts * (experts - 1) / 2
    return total / (max(1, count) if denominator is None else denominator) / pairs
