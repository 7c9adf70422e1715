"""An independent, slow replay: sets, rescans and the rules as written; shares no code with ours."""

from dataclasses import dataclass, field


@dataclass
class Tally:
    uses: int = 0
    hits: int = 0
    loads: int = 0
    requests: int = 0
    chunked: int = 0


@dataclass
class Layer:
    """One layer's cache by the rules of the docstrings, with every score kept for every expert."""

    num_experts: int
    capacity: int
    rule: str
    future: list = field(default_factory=list)
    gamma: float = 0.98
    popularity: list = field(default_factory=list)

    def __post_init__(self):
        self.resident = []
        self.served = []  # every expert served, in order: LRU looks for the last position
        self.score = [0.0] * self.num_experts
        self.now = 0

    def badness(self, expert):
        """The larger, the sooner it leaves."""
        if self.rule == "lru":
            return -max(i for i, e in enumerate(self.served) if e == expert)
        if self.rule == "lfu":
            return -self.score[expert]
        if self.rule == "static":
            return -self.popularity[expert]
        later = [i for i in range(self.now, len(self.future)) if expert in self.future[i]]
        return min(later, default=10**9)

    def make_room(self, needed, count):
        while len(self.resident) + count > self.capacity:
            free_to_go = sorted(e for e in self.resident if e not in needed)
            worst = max(self.badness(e) for e in free_to_go)
            self.resident.remove(next(e for e in free_to_go if self.badness(e) == worst))

    def serve(self, use_counts):
        """Serve a request given as {expert: uses}; return its tally."""
        experts = sorted(use_counts)
        hits = [e for e in experts if e in self.resident]
        missing = [e for e in experts if e not in self.resident]
        fits = len(experts) <= self.capacity
        if not fits:
            missing.sort(key=lambda e: (use_counts[e], e))
        self.served += experts if fits else hits + missing
        self.score = [self.gamma * s + (e in use_counts) for e, s in enumerate(self.score)]
        self.now += 1

        tally = Tally(sum(use_counts.values()), sum(use_counts[e] for e in hits), len(missing), 1)
        part = hits + missing[: self.capacity - len(hits)]
        rest = missing[self.capacity - len(hits) :]
        decisions = 0
        while True:
            new = [e for e in part if e not in self.resident]
            self.make_room(part, len(new))
            self.resident += new
            decisions += 1
            if not rest:
                break
            part, rest = rest[: self.capacity], rest[self.capacity :]
        tally.chunked = int(decisions > 1)
        return tally


def passes_of(trace):
    """Rows of each forward pass, and per pass and layer {expert: uses}."""
    passes = {}
    for row in range(len(trace)):
        passes.setdefault(int(trace.forward[row]), []).append(row)
    needs = []
    for rows in passes.values():
        needs.append([])
        for layer in range(trace.num_layers):
            counts = {}
            for row in rows:
                for expert in trace.experts[row, layer].tolist():
                    if expert >= 0:
                        counts[expert] = counts.get(expert, 0) + 1
            needs[-1].append(counts)
    return list(passes.values()), needs


def popularity_of(trace):
    """Choices of each layer and expert by rows that are no padding."""
    counts = [[0] * trace.num_experts for _ in range(trace.num_layers)]
    for row in range(len(trace)):
        for layer in range(trace.num_layers):
            for expert in trace.experts[row, layer].tolist():
                if expert >= 0 and trace.kind[row] != 2:
                    counts[layer][expert] += 1
    return counts


def replay(trace, slots, rule, gamma=0.98):
    """Tallies by (phase, layer) of a whole trace, and tokens and zero-miss tokens by phase."""
    passes, needs = passes_of(trace)
    size, popular = trace.num_experts, popularity_of(trace)
    layers = [
        Layer(size, slots, rule, [set(need[n]) for need in needs if need[n]], gamma, popular[n])
        for n in range(trace.num_layers)
    ]
    tallies = {(p, n): Tally() for p in (0, 1) for n in range(trace.num_layers)}
    tokens, zero_miss = [0, 0], [0, 0]
    for rows, need in zip(passes, needs, strict=True):
        kinds = {int(trace.kind[row]) for row in rows}
        phase = 1 if 1 in kinds and 0 not in kinds else 0
        loads = 0
        for n, layer in enumerate(layers):
            if not need[n]:
                continue  # nobody chose an expert: no request
            tally = layer.serve(need[n])
            total = tallies[phase, n]
            for name in vars(total):
                setattr(total, name, getattr(total, name) + getattr(tally, name))
            loads += tally.loads
        tokens[phase] += len(rows)
        zero_miss[phase] += len(rows) * (loads == 0)
    return tallies, tokens, zero_miss
