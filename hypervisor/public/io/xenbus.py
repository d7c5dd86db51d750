"""Connection states of a split driver (xen/include/public/io/xenbus.h)."""

from __future__ import annotations

from enum import IntEnum


class XenbusState(IntEnum):
    """What one end says of itself in its node `state`."""

    UNKNOWN = 0  # no node: gone, or not there yet
    INITIALISING = 1  # the toolstack made the node
    INIT_WAIT = 2  # the backend published its features and waits for the frontend
    INITIALISED = 3  # the frontend published its ring and event channel
    CONNECTED = 4
    CLOSING = 5  # no new requests; what is under way is being finished
    CLOSED = 6  # nothing is mapped or granted any more
