"""Arrays and what is said of them, out of the bytes of a safetensors file."""

import json
import struct

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load


def parse_tensors(blob: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """
    Arrays by name, and the metadata, which `safetensors.numpy.load` leaves out.

    Raises:
        ValueError: the bytes are torn, or no safetensors file.
    """
    try:
        arrays = load(blob)
        (length,) = struct.unpack_from("<Q", blob)
        return arrays, json.loads(blob[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, KeyError, struct.error) as error:
        raise ValueError(str(error)) from error
