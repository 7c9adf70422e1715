"""Find what ships with the package: a small trained model, questions and answers, held-out text."""

from pathlib import Path

HERE = Path(__file__).parent
TINY_OLMOE = HERE / "tiny-olmoe"
GSM8K_TRAIN = HERE / "gsm8k" / "train.jsonl"
GSM8K_TEST = HERE / "gsm8k" / "test.jsonl"
HELD_OUT = HERE / "held_out"
