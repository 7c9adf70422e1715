"""Shared by all tests: nothing is downloaded, and one thread is enough for tiny models."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# Triton asks once, when it is first imported, which importing transformers does. Interpreted, its
# kernels run on the CPU; benchmarks/gpu/run.sh sets 0 to run tests/gpu compiled.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

torch.set_num_threads(1)
