"""Small whole files of every kind that a command reads, made by the commands themselves."""

import shutil

import numpy as np

from tests.data_rows import write
from tests.fuzz.running import run
from tests.small_olmoe import write_checkpoint

ROWS = [{"prompt": f"w{i} w{i + 1} w{i + 2}", "completion": "w5 w6 w7"} for i in range(2, 26)]


def make(folder):
    """Write them into *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    model, data = folder / "model", folder / "data.jsonl"
    write_checkpoint(model)
    write(data, *ROWS)
    rows = ["token,layer,sequence,kind,expert_0,expert_1"]
    rows += [f"{t},{layer},0,1,{t % 4},{(t + 1) % 4}" for t in range(6) for layer in range(2)]
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    np.savez(folder / "array.npz", experts=np.arange(24).reshape(6, 2, 2) % 4)
    lines = [
        {
            "layer": layer,
            "token_idx": t,
            "topk_ids": [t % 4, (t + 1) % 4],
            "topk_weights": [0.6, 0.4],
        }
        for t in range(6)
        for layer in range(2)
    ]
    write(folder / "lines.jsonl", *lines)
    trace, predictor = folder / "trace.safetensors", folder / "predictor"
    for made in (
        ["trace", model, "--data", data, "--out", trace, "--max-new-tokens", 4],
        ["predictor", "fit", trace, "--out", predictor, "--slots", 2],
        ["evaluate", model, "--data", data, "--out", folder / "records.jsonl"],
        ["finetune", model, "--data", data, "--out", folder / "tuned", "--steps", 1,
         "--no-measure", "--save", "both"],
    ):  # fmt: skip
        ended = run(made)
        assert ended.code == 0 and not ended.raised, (made, ended)
    return folder


def readers(folder):
    """
    Give name -> (file to damage, command that reads it, folder to copy before).

    The folder is that of a checkpoint or predictor, all of which a command reads together.
    """
    model, tuned, predictor = folder / "model", folder / "tuned", folder / "predictor"
    serve = ["w3 w4", "--slots", "4", "--max-new-tokens", "1"]
    fit = ["--gpu-memory", "1GiB", "--json"]
    found = {
        "trace": (folder / "trace.safetensors", lambda p: ["simulate", p, "--slots", "2"]),
        "records": (folder / "records.jsonl", lambda p: ["report", p, "--out", p.parent / "page"]),
        "table": (folder / "table.csv", lambda p: _imported(p, "--num-experts", 8)),
        "array": (folder / "array.npz", lambda p: _imported(p, "--num-experts", 8)),
        "lines": (folder / "lines.jsonl", lambda p: _imported(p, "--num-experts", 8)),
        "config to plan": (model / "config.json", lambda p: ["plan", p, *fit]),
    }
    for name in ("config.json", "generation_config.json", "tokenizer.json",
                 "tokenizer_config.json", "model.safetensors"):  # fmt: skip
        found[name] = (model / name, lambda p: ["generate", p.parent, *serve])
    found["melinoe.json"] = (tuned / "melinoe.json", lambda p: ["card", p.parent])
    for path in sorted((tuned / "adapter").glob("adapter*")):
        found[path.name] = (
            path,
            lambda p: ["merge", p.parent, "--out", p.parent.parent / "merged", "--base", model],
        )  # fmt: skip
    for path in sorted(predictor.iterdir()):
        found[f"predictor's {path.name}"] = (
            path, lambda p: ["generate", model, *serve, "--predictor", p.parent]
        )  # fmt: skip
    return found


def _imported(path, *options):
    return ["import-trace", path, "--out", path.parent / "imported.safetensors", *options]


def damaged(source, content, place):
    """Put *content* where *source* stands, in a copy of the folder that it is read with."""
    shutil.rmtree(place, ignore_errors=True)
    alone = (
        source.suffix in (".safetensors", ".jsonl", ".csv", ".npz")
        and not (source.parent / "config.json").exists()
    )
    if alone and source.parent.name not in ("predictor", "adapter"):
        place.mkdir(parents=True)
    else:
        shutil.copytree(source.parent, place)
    path = place / source.name
    path.write_bytes(content)
    return path
