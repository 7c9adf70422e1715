"""
The hub's checkpoint layout: opened and checked without its weights, read piece by piece.

    safetensors_file.py   one file: header checked, any range read into the caller's memory
    positioned.py         bytes of an open file at an offset, on every system
    hub.py                one file by its name: in a directory, in the local cache, on the hub
    files.py              config, index and shards, read and checked
    mapping.py            stored names -> parameters of the model, by transformers' own rules
    sources.py            how to read one expert's part of a parameter
    tracing.py            what a rule does to one expert, found by running it on stand-ins
    fitting.py            whether the experts' tensors are all there, and of the right shapes
    opening.py            open_checkpoint: all of the above, nothing read yet
    backbone.py           load_model; load_backbone: the model with everything but its experts
    describing.py         describe: what a checkpoint is, for doctor and planner
    tokenizer.py          the model's own tokenizer, or a refusal
    metadata.py           melinoe.json: read, checked, written   metadata_schema.py  its fields
    origin.py             where a fine-tuned model comes from: its base's licence, its data's hash
    rewriting.py          a copy of the base's weight files, what changed overwritten
    other_files.py        what else a checkpoint holds, copied as it is
    export_rules.py       what other engines read otherwise
    writing.py            write_model: both of these, whole or not at all
    unfinished.py         a directory to fill beside what it will become; SIGTERM deletes it
"""

from melinoe.checkpoint.backbone import load_backbone, load_model
from melinoe.checkpoint.describing import Description, describe
from melinoe.checkpoint.metadata import read_metadata, update_metadata, write_metadata
from melinoe.checkpoint.opening import Checkpoint, ExpertSource, open_checkpoint
from melinoe.checkpoint.origin import describe_base, describe_data
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
