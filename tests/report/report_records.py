"""Records made by arithmetic, shaped like those of a demo run; what tests compare against."""

import math
import random

MODELS = ("base", "control", "fine-tuned")
CORPORA = ("grade-school mathematics", "encyclopedia", "stories", "code", "news", "dialogue")
EMULATED = {"bandwidth_gb_s": 0.5, "latency_us": 50, "emulated": True}


def estimate(mean, half, n=48):
    """An estimate that reaches *half* to both sides."""
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def serve_record(strategy, link=None, **changes):
    """One serve record; hit rates, transfers and speeds differ by strategy and link."""
    hit, moved, speed = {
        "base": (0.636, 5.824, 21.5),
        "control": (0.627, 5.968, 21.25),
        "fine-tuned": (0.842, 2.528, 26.0),
        "fine-tuned + prefetch": (0.851, 2.384, 26.5),
        "all resident": (1.0, 0.0, 31.0),
    }[strategy]
    whole = strategy == "all resident"
    record = {
        "kind": "serve",
        "model": "base" if whole else strategy.removesuffix(" + prefetch"),
        "strategy": strategy,
        "slots": 32 if whole else 8,
        "num_experts": 32,
        "top_k": 4,
        "layers": 4,
        "policy": "lru",
        "store": "disk",
        "link": link,
        "prompts": 48,
        "max_new_tokens": 64,
        "hit_rate": estimate(hit, 0.0 if whole else 0.0125),
        "adjusted_hit_rate": estimate(hit - (0.02 if "prefetch" in strategy else 0), 0.012),
        "zero_miss_tokens": estimate(1.0 if whole else hit**4 / 2, 0.0 if whole else 0.02),
        "transfers_per_token": estimate(moved, 0.0 if whole else 0.125),
        "prefetch_transfers_per_token": estimate(0.31 if "prefetch" in strategy else 0.0, 0.0),
        "prefill_transfers": estimate(61.4, 3.2),
        "tokens_per_s": estimate(speed / (4 if link else 1), 0.5),
        "tpot_s": estimate(1 / speed, 0.001),
        "ttft_s": estimate(0.21, 0.02),
        "stall_ms_per_token": estimate(moved * 1.5, 0.4),
        "per_prompt": {
            "prompt_tokens": [9, 7, 8],
            "loads": [10 * moved, 20 * moved, 30 * moved],
            "tokens": [10, 20, 30],
            "new_tokens": [10, 20, 30],
            "seconds": [count * (4 if link else 1) / speed for count in (10, 20, 30)],
        },
        "machine": {"cpu": "Example CPU", "cores": 2, "ram_gib": 8.0, "gpu": None},
    }
    return {**record, **changes}


def quality_records():
    """Perplexity of three models on six corpora, the first of them trained on."""
    records = []
    for place, model in enumerate(MODELS):
        for number, domain in enumerate(CORPORA):
            start = 31.5 + 11 * number
            value = start * ((1, 0.62, 0.631)[place] if number == 0 else (1, 1.04, 1.05)[place])
            low_high = estimate(value, 0.035 * value, 200)
            nll = estimate(math.log(value), 0.035, 200)
            each = {"nll": [10 * math.log(value)] * 3, "tokens": [10] * 3}
            base = {"kind": "quality", "model": model, "domain": domain}
            rest = {
                "in_domain": number == 0,
                "perplexity": low_high,
                "nll": nll,
                "per_sequence": each,
            }
            records.append({**base, **rest})
    return records


def locality_record(model, mean, count=120):
    """Experts per sequence, spread around *mean* so that their mean is exactly it."""
    shake = random.Random(model)
    offsets = [shake.gauss(0, 1.6) for _ in range(count // 2)]
    values = [mean + offset for offset in offsets] + [mean - offset for offset in offsets]
    return {
        "kind": "locality",
        "model": model,
        "experts_per_sequence": values,
        "reuse": estimate(0.33, 0.01),
        "distinct_experts": 31.5,
        "num_experts": 32,
    }


def curve_record(model, policy):
    """A hit rate that rises with the slots, higher for the fine-tuned model and for Belady."""
    bend = {"base": 1.0, "control": 1.02, "fine-tuned": 0.42}[model]
    bend *= {"lru": 1.0, "lfu": 0.93, "belady": 0.6}[policy]
    slots = [4, 6, 8, 12, 16, 20, 24, 28, 32]
    rates = [1 - (1 - count / 32) ** (1 / bend) for count in slots]
    return {
        "kind": "curve",
        "model": model,
        "policy": policy,
        "slots": slots,
        "hit_rate": [estimate(rate, 0.012 * (1 - rate)) for rate in rates],
        "num_experts": 32,
    }


def training_record(model, steps=300):
    """Losses that fall; the control's cache loss is measured but stays."""
    shake = random.Random(model)
    log = []
    for step in range(1, steps + 1):
        left = math.exp(-step / 80)
        tuned = model == "fine-tuned"
        row = {"step": step, "nll": 3.0 + 0.6 * left + shake.gauss(0, 0.05) + 0.04 * tuned}
        row["cache"] = (0.24 + 0.3 * left if tuned else 0.55) + shake.gauss(0, 0.01)
        row["anchor"] = (0.02 * (1 - left) if tuned else 0.004) + abs(shake.gauss(0, 0.0008))
        row["loss"] = row["nll"] + (row["cache"] * 0.5 if tuned else 0)
        log.append(row)
    settings = {"steps": steps, "learning_rate": 1e-3, "lambda_cs": 0.5 if tuned else 0.0}
    return {"kind": "training", "model": model, "log": log, "settings": settings}


def predictor_record(model, lift):
    """Recall of four predictions; the prefill's experts win."""
    recall = {"empty": 0.0, "popularity": 0.38, "prefill": 0.57, "learned": 0.54}
    estimates = {
        name: estimate(value + lift * (value > 0), 0.011 * (value > 0))
        for name, value in recall.items()
    }
    return {"kind": "predictor", "model": model, "slots": 8, "recall": estimates}


def demo_record():
    """The run itself."""
    return {
        "kind": "demo",
        "settings": {"model": "shipped", "slots": 8, "seed": 0, "command": "melinoe demo"},
        "seconds": {"load": 1.2, "finetune_control": 148.0, "finetune": 171.0, "serve": 122.0},
        "machine": {"cpu": "Example CPU", "cores": 2, "ram_gib": 8.0, "gpu": None},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "commit": "0123abc",
        "date": "2026-01-02",
    }


def demo_records():
    """All records of a run."""
    records = [demo_record()]
    for strategy in ("base", "control", "fine-tuned", "fine-tuned + prefetch"):
        records += [serve_record(strategy), serve_record(strategy, EMULATED)]
    records.append(serve_record("all resident"))
    records += quality_records()
    means = {"base": 21.25, "control": 21.5, "fine-tuned": 9.75}
    records += [locality_record(model, mean) for model, mean in means.items()]
    records += [
        curve_record(model, policy)
        for model in ("base", "fine-tuned")
        for policy in ("lru", "lfu", "belady")
    ]
    records += [predictor_record("base", 0.0), predictor_record("fine-tuned", 0.17)]
    records += [training_record("control"), training_record("fine-tuned")]
    return records
