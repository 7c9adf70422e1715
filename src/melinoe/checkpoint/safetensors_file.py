"""One safetensors file, read piece by piece into memory that the caller owns; nothing is mapped."""

import ctypes
import json
import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import _TYPES
from torch import Tensor

from melinoe.checkpoint.direct import DirectReader
from melinoe.errors import CheckpointError

DTYPES: dict[str, Any] = {**_TYPES, "F8_E8M0": torch.float8_e8m0fnu}
"""torch's types by the names that the format gives them."""

# The format's own limit on a header, which keeps a garbled length from asking for all memory.
LARGEST_HEADER_BYTES = 100_000_000
# Windows opens files as text unless told otherwise.
BINARY = os.O_RDONLY | getattr(os, "O_BINARY", 0)
# File systems note the time of a change in steps of a timer's tick, 10 ms at most.
_TICK_NS = 20_000_000
_ONCE_BYTES = 1 << 24
_lock = threading.Lock()

Stamp = tuple[int, ...]
"""Device, inode, size, time of change, time of change of anything, links: change with the bytes."""


def read_at(handle: int, into: memoryview, offset: int) -> int:
    """Read a file from *offset* on, beside other threads; how many bytes came, 0 at its end."""
    if hasattr(os, "preadv"):
        return os.preadv(handle, [into], offset)
    with _lock:  # Windows and macOS: the position belongs to the open file, so one at a time
        os.lseek(handle, offset, os.SEEK_SET)
        got = os.read(handle, min(len(into), _ONCE_BYTES))
    into[: len(got)] = got
    return len(got)


class TensorInfo(NamedTuple):
    """Locate one tensor in a file: type, shape, first byte, and the byte behind its last."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Count the bytes of the tensor as it is stored."""
        return self.stop - self.start


class SafetensorsFile:
    """
    Read a safetensors file, whose header is checked against the file's real size.

    Threads may read at the same time. A file that another one replaces goes on being read, for its
    bytes stay until it is closed; one that is written to in place is refused from then on, with a
    CheckpointError, as is a torn one.

    Source:
        https://github.com/huggingface/safetensors#format
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._direct: DirectReader | None = None
        try:
            self._fd = os.open(self.path, BINARY)
        except OSError as error:
            raise CheckpointError(
                f"the shard {self.path} cannot be opened ({error.strerror}); download it again"
            ) from None
        # Closes the file once: by close(), or when nothing refers to this object any more.
        self._closing = weakref.finalize(self, os.close, self._fd)
        try:
            found = os.fstat(self._fd)
            if 0 <= time.time_ns() - found.st_ctime_ns < _TICK_NS:
                time.sleep(_TICK_NS / 1e9)  # so that a change after this one has another time
                found = os.fstat(self._fd)
            self.stamp = _stamp(found)
            self.tensors = self._read_header(found.st_size)
            self.check_unchanged()
        except BaseException as error:
            self.close()  # not when the error and its frames are gone: nobody knows when that is
            if isinstance(error, OSError):
                raise self._unreadable(error) from None
            raise

    def check_unchanged(self) -> None:
        """Raise a CheckpointError if the file was, or by its times may have been, written to."""
        now, then = _stamp(os.fstat(self._fd)), self.stamp
        if now == then:
            return
        # A new name, a further one, or none any more changes the last time, and not a byte.
        moved = now[5] != then[5] or (_stamp_at(self.path) or ())[:2] != now[:2]
        if now[:4] != then[:4] or not moved:
            raise _changed(self.path)
        self.stamp = now

    def _read_header(self, size: int) -> dict[str, TensorInfo]:
        """Read the header: name -> place in the file, every range checked."""
        length = int.from_bytes(self._start(8, 0), "little")
        if size >= 8 and length > LARGEST_HEADER_BYTES:
            raise self._torn(f"a header of {length} bytes, above the format's limit")
        if size < 8 or length > size - 8:
            raise self._torn(f"{size} bytes, too few for its header")
        try:
            header = json.loads(self._start(length, 8), object_pairs_hook=_without_repeats)
            header.pop("__metadata__", None)
            tensors = {key: self._place(key, entry, 8 + length) for key, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._torn(f"a header that is not safetensors ({error})") from None
        reached, before = 8 + length, ""
        for name, info in sorted(tensors.items(), key=lambda item: item[1][2:]):
            if info.start < reached:
                raise self._torn(f"a header by which {before} and {name} share bytes")
            if info.start > reached:
                gap = info.start - reached
                raise self._torn(f"{gap} bytes before {name} that belong to no tensor")
            reached, before = info.stop, name
        if reached > size:
            raise self._torn(f"{size} bytes where its header promises {reached}")
        if reached < size:
            raise self._torn(f"{size - reached} bytes behind its last tensor")
        return tensors

    def _start(self, count: int, offset: int) -> bytes:
        """Read at most *count* bytes from *offset* on: fewer where the file ends before."""
        found = bytearray(count)
        view, done = memoryview(found), 0
        while got := read_at(self._fd, view[done:], offset + done):
            done += got
        return bytes(found[:done])

    def _place(self, name: str, entry: dict, origin: int) -> TensorInfo:
        """Check one header entry; ValueError where its range and shape disagree."""
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"the shard {self.path} keeps {name} as {entry['dtype']}, a type that is not "
                "read here; take a checkpoint of the model in another type, if there is one"
            )
        dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
            raise ValueError(f"{name} has a shape or an offset that is no whole number")
        if stop - start != prod(shape) * dtype.itemsize:
            raise ValueError(f"{stop - start} bytes for shape {shape} of {entry['dtype']}")
        return TensorInfo(dtype, tuple(shape), origin + start, origin + stop)

    def _torn(self, what: str) -> CheckpointError:
        return CheckpointError(f"the shard {self.path} is torn: it has {what}; download it again")

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"the shard {self.path} cannot be read ({error.strerror}); check the disk, or download "
            "it again"
        )

    def read(self, name: str, into: Tensor, first: int = 0) -> None:
        """
        Read ``into.numel()`` elements from *first* on, in row-major order; converts the type if it
        differs.

        Bytes go straight into a contiguous CPU tensor of the stored type, else through a buffer.
        After a CheckpointError (the file was changed, or the disk fails) *into* holds anything.
        """
        info = self.tensors[name]
        start = info.start + first * info.dtype.itemsize
        if start < info.start or start + into.numel() * info.dtype.itemsize > info.stop:
            raise ValueError(f"elements {first}..{first + into.numel()} are outside {name}")
        if into.dtype == info.dtype and into.device.type == "cpu" and into.is_contiguous():
            self._fill(into, start)
        else:
            buffer = torch.empty(into.shape, dtype=info.dtype, device="cpu")
            self._fill(buffer, start)
            into.copy_(buffer)

    def _fill(self, into: Tensor, offset: int) -> None:
        """Fill a contiguous CPU tensor with the file's bytes from *offset* on."""
        if self.closed:
            raise ValueError(f"{self.path} is closed")
        room = (ctypes.c_char * into.nbytes).from_address(into.data_ptr())
        view = memoryview(room).cast("B")
        while len(view):
            # One call moves at most 2 GiB, and may move less than it was asked to.
            try:
                direct = self._direct
                done = direct.fill(view, offset) if direct else read_at(self._fd, view, offset)
            except OSError as error:
                raise self._unreadable(error) from None
            if done == 0:
                break  # it has shrunk, which its stamp shows
            view, offset = view[done:], offset + done
        # Afterwards: a change is stamped before its first byte can be read.
        self.check_unchanged()
        if len(view):
            raise self._torn(f"lost bytes after {offset} while it was being read")

    def read_past_cache(self) -> None:
        """Read past the system's page cache from now on; OSError where that cannot be."""
        if self._direct is None:
            self._direct = DirectReader(self._fd)

    @property
    def closed(self) -> bool:
        """Whether it can no longer be read."""
        return not self._closing.alive

    def close(self) -> None:
        """Close the file; reading afterwards is a caller's mistake."""
        self._closing()
        if self._direct is not None:
            self._direct.close()


class Place(NamedTuple):
    """Locate one stored tensor: the file that holds it, its name there, its header entry."""

    file: SafetensorsFile
    name: str
    info: TensorInfo

    def read(self, into: Tensor, first: int = 0) -> None:
        """Read ``into.numel()`` elements from *first* on; see `SafetensorsFile.read`."""
        self.file.read(self.name, into, first)

    def load(self) -> Tensor:
        """Read all of it into a new tensor on the CPU."""
        return load_whole(self)


def load_whole(place: Any) -> Tensor:
    """Read all of a stored tensor, plain or packed, into a new one on the CPU."""
    tensor = torch.empty(place.info.shape, dtype=place.info.dtype, device="cpu")
    place.read(tensor)
    return tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """Give the bytes of a CPU tensor, its own if it is contiguous."""
    data: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def check_same(stamps: Mapping[Path, Stamp]) -> None:
    """Raise a CheckpointError if a file that will be read again was changed or removed."""
    for path, then in stamps.items():
        if (_stamp_at(path) or ())[:4] != then[:4]:
            raise _changed(path)


def _stamp(found: os.stat_result) -> Stamp:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns,
            found.st_nlink)  # fmt: skip


def _stamp_at(path: Path) -> Stamp | None:
    try:
        return _stamp(os.stat(path))
    except OSError:
        return None


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"the file {path} was changed after it was opened, so what it gives now may belong to "
        "another model; load the model again once the file is whole, and write a new one beside it "
        "instead of into it"
    )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {max(names, key=names.count)} twice")
    return found


def describe_shape(shape: Sequence[int]) -> str:
    """Write ``(64, 2048)`` as ``64x2048``, for messages."""
    return "x".join(str(n) for n in shape)
