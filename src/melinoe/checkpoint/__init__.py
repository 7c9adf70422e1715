"""Read and write checkpoints of the hub's layout."""

from melinoe.checkpoint.backbone import load_backbone, load_model
from melinoe.checkpoint.metadata import (
    describe_base,
    describe_data,
    read_metadata,
    update_metadata,
    write_metadata,
)
from melinoe.checkpoint.opening import Checkpoint, Description, describe, open_checkpoint
from melinoe.checkpoint.sources import ExpertSource
from melinoe.checkpoint.tokenizer import check_tokenizer, load_tokenizer
from melinoe.checkpoint.writing import check_output, write_model
