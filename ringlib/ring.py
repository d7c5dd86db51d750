"""FrontRing and BackRing: the two ends of a Xen ring over memory that is mapped already.

A batch is one bytes object of packed records: n * request_size in, n * response_size out. Taking copies each slot once;
what the peer changes afterwards is not seen. An impossible index poisons the ring: every later call raises Broken.
"""

from __future__ import annotations

import errno
from typing import Any, Protocol

from ringlib._ring import ffi, lib


class Buffer(Protocol):
    """Contiguous memory, whatever its items are: bytes, bytearray, memoryview, array, mmap, a numpy array."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class RingError(Exception):
    """Base of what a ring can answer."""


class Closed(RingError):
    """We closed it."""


class Broken(RingError):
    """The peer violated the ring, or is gone."""


class Busy(RingError):
    """Somebody else is using it."""


class WouldBlock(RingError):
    """It does not all fit now; nothing was published."""


def _checked(result: int) -> int:
    if result >= 0:
        return result
    if result == -errno.EAGAIN:
        raise WouldBlock("the ring has no room for the whole batch")
    raise Broken("the peer's index cannot be")


def _count(records: Any, size: int) -> int:
    """Of a bytes object or a cffi view, both of which count bytes whatever the items of the original are."""
    n, rest = divmod(len(records), size)
    if rest:
        raise ValueError(f"{len(records)} bytes are not records of {size}")
    return n


def _at_most(max_items: int | None, nr_ents: int) -> int:
    return nr_ents if max_items is None else min(max_items, nr_ents)


class FrontRing:
    """The end that asks. Initialises the shared header.

    address: host address of the ring's first byte; size: its bytes (a multiple of the page size).
    """

    def __init__(self, address: int, size: int, request_size: int, response_size: int, start: int = 0) -> None:
        self.state: Any = ffi.new("char[64]")
        if lib.front_init(self.state, ffi.cast("void *", address), size, request_size, response_size, start):
            raise ValueError(f"no entry of {max(request_size, response_size)} bytes fits {size}")
        self.request_size, self.response_size = request_size, response_size
        self.nr_ents: int = lib.front_entries(self.state)
        self._out: Any = ffi.new("char[]", self.nr_ents * response_size)

    @property
    def free(self) -> int:
        """Requests that fit now."""
        return lib.front_free(self.state)

    @property
    def pending(self) -> int:
        """Requests without a response taken."""
        return lib.front_outstanding(self.state)

    def publish(self, requests: Buffer) -> bool:
        """Make packed requests visible, all or none; True: notify the peer. Raises WouldBlock, Broken."""
        view = ffi.from_buffer(requests)
        return _checked(lib.front_publish(self.state, view, _count(view, self.request_size))) == 1

    def take(self, max_items: int | None = None) -> bytes:
        """Packed responses, at most `max_items`; b"" if there are none. Raises Broken."""
        n = _checked(lib.front_take(self.state, self._out, _at_most(max_items, self.nr_ents)))
        return bytes(ffi.buffer(self._out, n * self.response_size))

    def recheck(self) -> bool:
        """Before sleeping: ask to be told, look again. True: there is work, do not sleep."""
        return lib.front_recheck(self.state) != 0


class BackRing:
    """The end that answers, in any order."""

    def __init__(self, address: int, size: int, request_size: int, response_size: int) -> None:
        self.state: Any = ffi.new("char[64]")
        if lib.back_attach(self.state, ffi.cast("void *", address), size, request_size, response_size):
            raise ValueError(f"no entry of {max(request_size, response_size)} bytes fits {size}")
        self.request_size, self.response_size = request_size, response_size
        self.nr_ents: int = lib.back_entries(self.state)
        self._out: Any = ffi.new("char[]", self.nr_ents * request_size)

    @property
    def pending(self) -> int:
        """Requests taken and not answered."""
        return lib.back_unanswered(self.state)

    def take(self, max_items: int | None = None) -> bytes:
        """Packed requests, copied once. Raises Broken."""
        n = _checked(lib.back_take(self.state, self._out, _at_most(max_items, self.nr_ents)))
        return bytes(ffi.buffer(self._out, n * self.request_size))

    def publish(self, responses: Buffer) -> bool:
        """Answer; True: notify the peer. Raises WouldBlock (more than were taken), Broken."""
        view = ffi.from_buffer(responses)
        return _checked(lib.back_publish(self.state, view, _count(view, self.response_size))) == 1

    def recheck(self) -> bool:
        """As FrontRing.recheck."""
        return lib.back_recheck(self.state) != 0
