"""Slots: a ring's payload cut into pieces of one size, so that what records speak of need not be copied.

    slots = Slots(ring, 65536)                             slots = Slots(ring, 65536)
    slot = slots.lease()                                   slot, length = HEAD.unpack(ring.get(1))
    length = file.readinto(slots[slot])                    out.write(slots[slot][:length])
    ring.put(HEAD.pack(slot, length))                      ring.put(ANSWER.pack(slot))
    slot, = ANSWER.unpack(ring.get(1))
    slots.release(slot)

The front leases and releases; the back, which keeps no account, only looks at what a record names. A slot that a back had
when it died is still leased, and the record that names it is taken again by the next back. The ring must go two ways: it is
the answer that says that a slot may be filled again.
"""

from __future__ import annotations

from ringlib.ring import WouldBlock
from ringlib.shared import SharedRing


class Slots:
    """`count` slots of `size` bytes each; slots[n] is a view of one, writable by both ends."""

    def __init__(self, ring: SharedRing, size: int) -> None:
        """size: bytes. Raises ValueError where not one fits the payload."""
        self.size = size
        self.count = len(ring.payload) // size if size > 0 else 0
        if not self.count:
            raise ValueError(f"no slot of {size} bytes fits {len(ring.payload)} bytes of payload")
        self._ring = ring
        self._free = list(range(self.count - 1, -1, -1))
        self._leased = bytearray(self.count)
        self.high_water = 0  # the most slots that were leased at once

    def __getitem__(self, slot: int) -> memoryview:
        """Raises IndexError of a number that is no slot: it may be one that a peer made up. Empty once the ring is closed."""
        if not 0 <= slot < self.count:
            raise IndexError(f"slot {slot} of {self.count}")
        return self._ring.payload[slot * self.size : (slot + 1) * self.size]

    @property
    def leased(self) -> int:
        """How many are out."""
        return self.count - len(self._free)

    def lease(self) -> int:
        """A slot that nobody uses, the one that was released last. Raises WouldBlock when all are out."""
        if not self._free:
            raise WouldBlock(f"all {self.count} slots are leased")
        slot = self._free.pop()
        self._leased[slot] = 1
        self.high_water = max(self.high_water, self.leased)
        return slot

    def release(self, slot: int) -> None:
        """Raises ValueError of one that is not leased, such as a peer names that answers twice."""
        if not 0 <= slot < self.count or not self._leased[slot]:
            raise ValueError(f"slot {slot} is not leased")
        self._leased[slot] = 0
        self._free.append(slot)
