"""Shared by all tests: nothing is downloaded, and one thread is enough for tiny models."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch

torch.set_num_threads(1)
