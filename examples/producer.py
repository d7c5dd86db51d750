#!/usr/bin/env python3
"""Send a file to consumer.py through shared memory, where both work on the same bytes.

    python examples/consumer.py copy.bin &
    python examples/producer.py original.bin

The file is read straight into slots of the ring's payload. A record of 16 bytes says which slot, how much of it, and where
in the file that belongs; the answer gives the slot back. The last record names a slot with the SHA-256 of it all, and is
answered with 1 if the copy has the same, else 0.
"""

from __future__ import annotations

import argparse
import hashlib
import struct
import sys
import time
from typing import BinaryIO

from ringlib import RingError, SharedRing, Slots

NAME = "/ring1-example"
SLOT = 256 << 10  # bytes
SLOTS = 16  # so many are on their way at once
CHUNK = struct.Struct("<QII")  # offset in the file, slot, bytes; no bytes: the digest is in the slot, the offset is the size
ANSWER = struct.Struct("<II")  # slot, whether all is well


def send(ring: SharedRing, file: BinaryIO) -> tuple[int, bool]:
    """The file's bytes, and whether the other side found them all. Raises RingError; EOFError where that left early."""
    slots, digest, offset = Slots(ring, SLOT), hashlib.sha256(), 0
    while True:
        while slots.leased == slots.count:
            take_back(ring, slots)
        slot = slots.lease()
        length = file.readinto(slots[slot])  # type: ignore[attr-defined]
        if not length:
            break
        digest.update(slots[slot][:length])
        ring.put(CHUNK.pack(offset, slot, length))
        offset += length
    slots[slot][: digest.digest_size] = digest.digest()
    ring.put(CHUNK.pack(offset, slot, 0))
    well = 0
    while slots.leased:
        well = take_back(ring, slots)
    return offset, bool(well)


def take_back(ring: SharedRing, slots: Slots) -> int:
    """Wait for answers, at least one; whether all is well, as the last of them says."""
    answers = list(ANSWER.iter_unpack(ring.get()))
    if not answers:
        raise EOFError("the consumer closed the ring before the end of the file")
    for slot, _ in answers:
        slots.release(slot)
    return int(answers[-1][1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="what to send")
    parser.add_argument("--name", default=NAME, help="of the ring (default: %(default)s)")
    options = parser.parse_args()
    try:
        with (
            open(options.file, "rb", buffering=0) as file,
            SharedRing.create(options.name, CHUNK.size, ANSWER.size, payload=SLOTS * SLOT, replace=True) as ring,
        ):
            begin = time.monotonic()
            size, well = send(ring, file)
            seconds = time.monotonic() - begin
    except (RingError, OSError, EOFError) as error:
        print(f"producer: {error}", file=sys.stderr)
        return 1
    print(f"sent {size} bytes in {seconds:.3f} s, {'the same arrived' if well else 'something else arrived'}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
