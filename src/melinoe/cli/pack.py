"""`melinoe pack`: a checkpoint is written once with its experts in another format."""

from typing import Annotated

from melinoe.cli import models, options, output
from melinoe.cli.command import option


def command(
    model: options.Model,
    out: options.Out,
    format: Annotated[
        str,
        option(
            "int8, int4, mxfp4 or fp8; int4-g32 and int4-g128 share a scale by 32 and 128 weights. "
            "plain: packed weights as they mean, for training and other engines."
        ),
    ] = "int4",
) -> None:
    """Write a checkpoint with its experts packed, which takes less disk and memory."""
    from melinoe.checkpoint.pack import pack

    output.quiet()
    pack(models.resolve(model), format, out)
    output.say(f"wrote {out}")
