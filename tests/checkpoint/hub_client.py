"""
Run by test_hub_download.py in a process of its own: the hub's client reads HF_ENDPOINT once.

Reads one Python expression per line and answers with one line of JSON: ``{"value": ...}``, or the
error's type and sentence. In the expressions `melinoe`, `torch`, the functions of
`melinoe.checkpoint` and `first_logits(model)` are known.
"""

import json
import sys
import time

import torch

import melinoe
from melinoe import checkpoint

torch.set_num_threads(1)
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # retries are not what is tested


def first_logits(model) -> list[float]:
    """Of the last of four tokens, the first five."""
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8]])).logits[0, -1, :5].tolist()


def answer(line: str) -> dict:
    known = vars(checkpoint) | {
        "checkpoint": checkpoint,
        "melinoe": melinoe,
        "torch": torch,
        "first_logits": first_logits,
    }
    try:
        return {"value": eval(line, known)}  # written by the test, read by nobody else
    except melinoe.MelinoeError as error:
        return {"error": type(error).__name__, "message": str(error)}


for line in sys.stdin:
    print(json.dumps(answer(line)), flush=True)
