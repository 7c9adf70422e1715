"""
What cache-aware choice at run time adds to a model that was trained for locality.

Takes checkpoints that the study kept and reads held-out answers token by token with a quarter of
the experts resident (LFU), choices preferring resident experts by the cache prior at several
strengths; beside them the shipped model with its own choices. `summary.py` sets them against the
study's like-for-like controls.

Bad news would be: perplexity that rises as fast as transfers fall.

Not measured here: out-of-domain text; speed.
"""

import torch
from kept import BASE, done, given, parser
from plan import JUDGED_FROM

from melinoe.cache.counters import COMPLETION
from melinoe.checkpoint import load_tokenizer
from melinoe.data import encode, load_examples
from melinoe.engine.load import load
from melinoe.evaluate import decoded_perplexity
from melinoe.measure import append_jsonl, machine
from melinoe.moe.choice import ChoiceSettings
from melinoe.shipped import GSM8K_TRAIN

TEXTS, SLOTS, POLICY, LENGTH = 128, 8, "lfu", 512
STRENGTHS = (0.05, 0.1, 0.2)


def measure(name: str, seed: int, path: str, strength: float, count: int) -> dict:
    """Loss and loads of each text; strength 0 is the router's own choice."""
    model, handle = load(path, "cpu", slots=SLOTS, policy=POLICY, dtype=torch.float32)
    texts = load_examples(GSM8K_TRAIN)[JUDGED_FROM : JUDGED_FROM + count]
    encoded = encode(texts, load_tokenizer(path, model.config), LENGTH)
    if strength:
        handle.choose(ChoiceSettings(kind="cache-prior", strength=strength, keep=1))
    found = decoded_perplexity(model, handle, encoded)
    changed, uses = handle.changed_choices, int(handle.counters.uses[COMPLETION].sum())
    handle.detach()
    return {
        "kind": "stacked",
        "name": name,
        "seed": seed,
        "strength": strength,
        "changed_share": changed / uses,
        "nll": found.perplexity.nll.round(4).tolist(),
        "predicted": found.perplexity.tokens.astype(int).tolist(),
        "loads": found.loads.tolist(),
        "tokens": found.tokens.tolist(),
        "machine": machine(),
    }


def main() -> None:
    takes = parser(__doc__, "stacked.jsonl")
    takes.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    takes.add_argument("--texts", type=int, default=TEXTS, help="the same first ones for all")
    arguments = takes.parse_args()
    there = done(arguments.out, "name", "seed", "strength")
    for name, seed, path in given(arguments.checkpoints):
        for strength in arguments.strengths if name != BASE else (0.0,):
            if (name, seed, strength) not in there:
                record = measure(name, seed, path, strength, arguments.texts)
                append_jsonl(arguments.out, record)
                rate = sum(record["loads"]) / sum(record["tokens"])
                loss = sum(record["nll"]) / sum(record["predicted"])
                print(name, seed, strength, f"{rate:.3f} transfers, {loss:.4f} nats", flush=True)


if __name__ == "__main__":
    main()
