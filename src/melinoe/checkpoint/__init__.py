"""
Read and write checkpoints of the hub's layout: opened and checked without a weight, then by piece.

    safetensors_file.py   one file: header checked, any range read into the caller's memory
    hub.py                one file by its name: in a directory, in the local cache, on the hub
    files.py              config, index and shards, read and checked
    packed.py             codes and scales -> one matrix, read as stored or decoded
    mapping.py            stored names -> parameters of the model, by transformers' own rules
    sources.py            how to read one expert's part of a parameter
    opening.py            open_checkpoint: all of the above, nothing read yet
    backbone.py           load_model; load_backbone: the model with everything but its experts
    describing.py         describe: what a checkpoint is, for doctor and planner
    tokenizer.py          the model's own tokenizer, or a refusal
    metadata.py           melinoe.json and its fields: read, checked, written
    export_rules.py       settings that other engines read otherwise
    writing.py            write_model: the base's files, what changed overwritten
    pack.py               pack: a checkpoint with its experts in another format
    verifying.py          SHA-256 of a checkpoint's files: recorded, and compared
"""

from melinoe.checkpoint.backbone import load_backbone, load_model
from melinoe.checkpoint.describing import Description, describe
from melinoe.checkpoint.metadata import (
    describe_base,
    describe_data,
    read_metadata,
    update_metadata,
    write_metadata,
)
from melinoe.checkpoint.opening import Checkpoint, open_checkpoint
from melinoe.checkpoint.sources import ExpertSource
from melinoe.checkpoint.tokenizer import check_tokenizer, load_tokenizer
from melinoe.checkpoint.writing import check_output, write_model

__all__ = [
    "Checkpoint",
    "Description",
    "ExpertSource",
    "check_output",
    "check_tokenizer",
    "describe",
    "describe_base",
    "describe_data",
    "load_backbone",
    "load_model",
    "load_tokenizer",
    "open_checkpoint",
    "read_metadata",
    "update_metadata",
    "write_metadata",
    "write_model",
]
