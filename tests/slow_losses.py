"""The losses written straight from their formulas: Python loops, float64, one thing at a time."""

import torch


def ids_of(row, num_experts):
    """The experts of one token's choices: ids outside the experts are skip slots."""
    return [e for e in row.tolist() if 0 <= e < num_experts]


def slow_cache_loss(
    logits,
    top_k_index,
    mask,
    segments,
    capacity,
    gamma,
    *,
    form="clipped",
    through_cache=False,
    num_experts=None,
    swap_margin=None,
    denominator=None,
):
    """s(t+1) = gamma s(t) + r(t) token by token; then every expert of every token, one by one."""
    experts = num_experts or logits.shape[-1]
    total, count = logits.new_zeros(()), 0
    for row in range(logits.shape[0]):
        s, current = [logits.new_zeros(()) for _ in range(experts)], None
        for t in range(logits.shape[1]):
            segment = int(segments[row, t])
            if segment == -1:
                continue
            if segment != current:
                s, current = [logits.new_zeros(()) for _ in range(experts)], segment
            p = logits[row, t].softmax(-1)[:experts]
            chosen = ids_of(top_k_index[row, t], experts)
            r = [float(e in chosen) + (p[e] - p[e].detach()) for e in range(experts)]
            if mask[row, t]:
                missing = missing_of(s, capacity, form)
                costs = [1.0] * experts
                if swap_margin is not None:
                    costs = swap_costs(p, chosen, missing, swap_margin)
                for e in range(experts):
                    total = total + r[e] * missing[e] * costs[e]
                count += 1
            s = [gamma * s[e] + (r[e] if through_cache else r[e].detach()) for e in range(experts)]
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


def swap_costs(p, chosen, missing, margin):
    """1 where the best resident expert that was not chosen is no less likely, 0 margin below."""
    p = p.detach()
    missing = [float(torch.as_tensor(m).detach()) for m in missing]
    resident = [1 - min(1.0, max(0.0, m)) for m in missing]
    best = max(float(p[e]) * resident[e] * (e not in chosen) for e in range(len(p)))
    if best == 0:
        return [0.0] * len(p)
    log_best = float(torch.tensor(best, dtype=torch.float64).log())
    costs = []
    for e in range(len(p)):
        gap = max(0.0, float(p[e].log()) - log_best)
        costs.append(max(0.0, 1 - gap / margin))
    return costs


def slow_rank_loss(logits, base, mask, rho, reduce, denominator=None):
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
    pairs = experts * (experts - 1) / 2 if reduce == "mean" else 1
    return total / (max(1, count) if denominator is None else denominator) / pairs


def slow_kl(logits, base, mask, denominator=None):
    """sum_e p_b log(p_b / p_f), token by token and expert by expert."""
    total, count = logits.new_zeros(()), 0
    for row in range(logits.shape[0]):
        for t in range(logits.shape[1]):
            if not mask[row, t]:
                continue
            p, b = logits[row, t].softmax(-1), base[row, t].softmax(-1)
            for e in range(logits.shape[-1]):
                total = total + b[e] * (b[e] / p[e]).log()
            count += 1
    return total / (max(1, count) if denominator is None else denominator)


def slow_distillation(logits, base, labels, denominator=None):
    """The same KL over the vocabulary, at the position before each label that counts."""
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != -100
    return slow_kl(logits, base, predicts, denominator)


def slow_reuse_loss(logits, top_k_index, mask, segments, denominator=None):
    """Of each token's experts, those that the token before it in its sequence did not use."""
    experts = logits.shape[-1]
    total, count = logits.new_zeros(()), 0
    for row in range(logits.shape[0]):
        for t in range(logits.shape[1]):
            if not mask[row, t]:
                continue
            same = t > 0 and segments[row, t - 1] == segments[row, t]
            previous = ids_of(top_k_index[row, t - 1], experts) if same else []
            p, chosen = logits[row, t].softmax(-1), ids_of(top_k_index[row, t], experts)
            for e in range(experts):
                if e not in previous:
                    total = total + float(e in chosen) + (p[e] - p[e].detach())
            count += 1
    return total / (max(1, count) if denominator is None else denominator)
