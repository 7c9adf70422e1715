"""Arrays and what is said of them, out of the bytes of a safetensors file."""

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from melinoe.errors import MelinoeError


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


@dataclass(frozen=True)
class FileKind:
    """
    Files of one kind, whose metadata names their ``format`` and holds a ``header`` in JSON.

    Attributes:
        format: The word in the metadata.
        versions: Those that can be read, ascending.
        what: What a file is, with its verb, for people: ``the trace {} is``, {} its path.
        noun: The same in one word: ``trace``.
        way_out: What a user does about a bad one.
        error: Raised.
    """

    format: str
    versions: tuple[int, ...]
    what: str
    noun: str
    way_out: str
    error: type[MelinoeError]

    def read(self, path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any], int]:
        """
        Arrays by name, the header without its version, and that; what they hold is not checked.

        Raises:
            MelinoeError: the kind's *error*: the file is missing, torn, of another kind, or of a
                version that is not known.
        """
        subject = self.what.format(path)
        try:
            blob = Path(path).read_bytes()
        except OSError as error:
            raise self.error(
                f"the {self.noun} {path} cannot be read: {error.strerror}; check the path"
            ) from error
        try:
            arrays, metadata = parse_tensors(blob)
        except ValueError as error:
            raise self.error(
                f"{subject} torn, or no {self.noun} ({error}); copy it again, or {self.way_out}"
            ) from error
        if metadata.get("format") != self.format:
            raise self.error(
                f"{path} is a safetensors file but holds no {self.noun}; {self.way_out}"
            )
        try:
            header = dict(json.loads(metadata["header"]))
        except (KeyError, TypeError, ValueError) as error:
            raise self.error(
                f"{subject} malformed: the header is not readable; {self.way_out}"
            ) from error
        version = header.pop("version", None)
        if version not in self.versions:
            raise self.error(
                f"{subject} of format version {version!r}, and this melinoe reads "
                f"{self.versions[-1]} at most; {self.way_out}, or install the melinoe that wrote it"
            )
        return arrays, header, version
