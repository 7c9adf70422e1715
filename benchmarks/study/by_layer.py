"""
What slots given to layers by need save, beside as many for each layer.

Takes checkpoints that the study kept, and the shipped model; reads held-out answers, and replays
them with a quarter of all experts resident: eight slots a layer, and the same total split by the
miss curves of other held-out texts. `summary.py` sets models against the base under the same rule.

Bad news would be: an allocation that loads more than the even split, on texts it has not seen.

Not measured here: quality, which does not depend on slots; speed.
"""

import torch
from judge import LENGTH
from kept import done, given, parser
from plan import JUDGED_FROM
from run import JUDGED

from melinoe.cache.allocate import allocate, cost_of
from melinoe.cache.counters import COMPLETION
from melinoe.cache.curves import miss_curves
from melinoe.cache.simulator import simulate
from melinoe.checkpoint import describe, load_tokenizer
from melinoe.data import encode, load_examples
from melinoe.engine.load import load
from melinoe.measure import append_jsonl, machine, reading_trace
from melinoe.shipped import GSM8K_TRAIN

SLOTS, POLICY, LEARNED_FROM = 8, "lfu", 64


def measure(name: str, seed: int, path: str) -> dict:
    """Loads and tokens of each text, with even slots and with slots by layer."""
    model, handle = load(path, "cpu", slots=describe(path).num_experts, dtype=torch.float32)
    end = JUDGED_FROM + JUDGED
    examples = load_examples(GSM8K_TRAIN)[JUDGED_FROM : end + LEARNED_FROM]
    encoded = encode(examples, load_tokenizer(path, model.config), LENGTH)
    judged = reading_trace(model, handle, encoded[:JUDGED])
    others = reading_trace(model, handle, encoded[JUDGED:])
    handle.detach()
    curves = miss_curves(others, POLICY, reset_between_sequences=True)
    split = allocate(cost_of(curves), SLOTS * judged.num_layers, at_least=judged.top_k)
    even = simulate(judged, SLOTS, POLICY, reset_between_sequences=True).per_sequence
    by_layer = simulate(judged, split, POLICY, reset_between_sequences=True).per_sequence
    return {
        "kind": "by-layer",
        "name": name,
        "seed": seed,
        "slots": [int(one) for one in split],
        "loads_even": [int(one.loads[COMPLETION].sum()) for one in even],
        "loads": [int(one.loads[COMPLETION].sum()) for one in by_layer],
        "tokens": [int(one.tokens[COMPLETION]) for one in by_layer],
        "machine": machine(),
    }


def main() -> None:
    arguments = parser(__doc__, "by_layer.jsonl").parse_args()
    there = done(arguments.out, "name", "seed")
    for name, seed, path in given(arguments.checkpoints):
        if (name, seed) not in there:
            record = measure(name, seed, path)
            append_jsonl(arguments.out, record)
            tokens = sum(record["tokens"])
            even, split = (sum(record[key]) / tokens for key in ("loads_even", "loads"))
            print(name, seed, f"{even:.3f} even, {split:.3f} with {record['slots']}", flush=True)


if __name__ == "__main__":
    main()
