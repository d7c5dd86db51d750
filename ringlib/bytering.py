"""A byte ring: a circular buffer with one writer and one reader, as Xen's console and xenstore pages have two of.

Each index is written by its one side; an index that cannot be raises Broken, and nothing of the buffer is believed.
"""

from __future__ import annotations

from typing import Any

from ringlib._ring import ffi, lib
from ringlib.ring import Broken


class ByteRing:
    """buffer, cons, prod: host addresses; size: bytes, a power of two."""

    def __init__(self, buffer: int, cons: int, prod: int, size: int) -> None:
        if size < 1 or size & (size - 1):
            raise ValueError(f"{size} bytes are not a power of two")
        self._buffer, self._cons, self._prod = (ffi.cast("void *", a) for a in (buffer, cons, prod))
        self._size = size
        self._out: Any = ffi.new("char[]", size)

    @property
    def used(self) -> int:
        """Bytes written and not read; what the indices say, believed by nobody who acts on it."""
        return lib.bytes_used(self._cons, self._prod)

    def write(self, data: bytes) -> int:
        """How many bytes went in. Raises Broken."""
        n = lib.bytes_write(self._buffer, self._cons, self._prod, self._size, data, len(data))
        if n < 0:
            raise Broken("the reader's index cannot be")
        return n

    def read(self) -> bytes:
        """All there is. Raises Broken."""
        n = lib.bytes_read(self._buffer, self._cons, self._prod, self._size, self._out, self._size)
        if n < 0:
            raise Broken("the writer's index cannot be")
        return bytes(ffi.buffer(self._out, n))
