# ruff: noqa: RUF001  (signs such as × and − are meant: they are what a reader sees)
"""What each word of a report means; the definitions are those of the measuring code."""

GLOSSARY: list[tuple[str, str]] = [
    (
        "expert, slot, resident",
        "A Mixture-of-Experts layer holds many experts and uses a few (top-k) per token. A slot is "
        "room for one expert in fast memory; an expert that lies in one is resident.",
    ),
    (
        "hit rate",
        "Share of expert uses (token × chosen expert) whose expert was resident. The adjusted hit "
        "rate is 1 − (demanded + prefetched transfers) / uses, so prefetching cannot flatter it.",
    ),
    (
        "zero-miss tokens",
        "Share of generated tokens that waited for no expert in any layer. A hit rate alone "
        "misleads: one missing expert in one layer makes the whole token wait.",
    ),
    (
        "transfers per token",
        "Experts copied into slots because a token needed them, all layers, per generated token. "
        "Prefetched ones and those of the prefill are counted apart. Evicting copies nothing.",
    ),
    (
        "precision, recall, waste of a prefetch",
        "Of the experts copied ahead of need, the share that was used before it left. Of what the "
        "completion would have missed, the share that was copied ahead in time. And the experts "
        "copied ahead that nobody used.",
    ),
    (
        "perplexity",
        "e to the mean negative log-likelihood per token on held-out text; lower is better. Where "
        "text has a prompt, such as a question, only the tokens of its answer count. In domain: "
        "the corpus that was trained on. Out of domain: the others, which show what training cost.",
    ),
    (
        "tokens/s",
        "Generated tokens per second of a whole answer. Time to first token includes reading the "
        "prompt, predicting and prefetching; time per later token is what follows.",
    ),
    ("stall", "Time a token waited for experts to arrive."),
    (
        "experts per sequence, reuse",
        "Distinct experts a sequence used, mean over layers; and the share of a token's experts "
        "that the token before it used.",
    ),
    (
        "recall",
        "Share of the uses in the completion that go to an expert the prediction had named, when "
        "it may name as many experts per layer as there are slots.",
    ),
    (
        "base, control, fine-tuned",
        "The model before training; trained without the locality terms; and trained with them. A "
        "control is like for like if nothing else differs: data, steps, seed, teacher, replay. "
        "Then the step from control to fine-tuned shows what the locality terms did, and is their "
        "price. A change from the base also holds what any fine-tuning on that text does.",
    ),
    (
        "LRU, LFU, Belady",
        "Which resident expert leaves: the longest unused; the least used, older uses counting "
        "less; the one needed latest, which takes knowledge of the future and so is a bound.",
    ),
    (
        "LFRU, score, static",
        "More of them: the one with the least uses over the time since the last; with the least of "
        "the router's weight lately; and the least popular by a count that stays as it is. In a "
        "replay that count is of the same trace, so with hindsight; served, it was made before.",
    ),
    (
        "intervals",
        "Every mean stands with its 95 % interval over prompts, sequences or documents. A ratio's "
        "range is paired over prompts where both runs list them, else the widest its two intervals "
        "allow. How a machine's speed drifts from one run to the next is in none of them. "
        "Sentences call two means different only if their intervals do not touch, or their ratio's "
        "range stays clear of 1.",
    ),
]

EMULATED = (
    "An emulated link makes each transfer last as long as the printed bandwidth and latency say. "
    "It is for comparing strategies on a machine without a separate fast memory; it is not the "
    "speed of any hardware."
)
UNMODIFIED = (
    "Over the unmodified link experts come from this machine's own storage, usually from pages "
    "that the operating system holds in memory already: transfers are cheap, so differences in "
    "speed are small."
)
