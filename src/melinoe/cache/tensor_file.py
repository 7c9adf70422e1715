"""Safetensors files that hold arrays and a header in JSON."""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from melinoe.errors import MelinoeError, TraceError
from melinoe.whole_file import write_whole


def write_file(path: str | os.PathLike, blob: bytes, noun: str) -> None:
    """
    Write a file that appears whole or not at all; one already there is replaced.

    Raises:
        TraceError: the place cannot be written to; *noun* is the word for it in the message.
    """
    try:
        write_whole(path, blob)
    except OSError as error:
        raise TraceError(
            f"the {noun} cannot be written to {path}: {error.strerror}; choose another place"
        ) from error


@dataclass(frozen=True)
class FileKind:
    """
    One kind of file: its metadata names the ``format`` and holds a ``header`` in JSON.

    Attributes:
        format: The word in the metadata.
        versions: Those that can be read, ascending.
        what: Begins a sentence about a file: ``the trace {} is``, {} its path.
        noun: The same in one word: ``trace``.
        way_out: Ends a sentence about a bad file: what to do.
        error: Raised.
    """

    format: str
    versions: tuple[int, ...]
    what: str
    noun: str
    way_out: str
    error: type[MelinoeError]

    def write(
        self, path: str | os.PathLike, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]
    ) -> None:
        """
        Write a file, the ``version`` in its header.

        Raises:
            TraceError: as `write_file`.
        """
        metadata = {"format": self.format, "header": json.dumps(header)}
        whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        write_file(path, save(whole, metadata=metadata), self.noun)

    def read(self, path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any], int]:
        """
        Read arrays by name, the header without its version, and that; their contents are unchecked.

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
            arrays = load(blob)
            (length,) = struct.unpack_from("<Q", blob)
            # The library's reader of bytes leaves the metadata out.
            metadata = json.loads(blob[8 : 8 + length]).get("__metadata__", {})
        except (SafetensorError, KeyError, ValueError, struct.error) as error:
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
