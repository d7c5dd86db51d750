#!/usr/bin/env python3
"""Receive a file from producer.py: each chunk is written from where it lies in shared memory.

    python examples/consumer.py copy.bin

It waits for a producer, and says at last whether the copy has the checksum that was sent.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys

from producer import ANSWER, CHUNK, NAME, SLOT

from ringlib import RingError, SharedRing, Slots


def receive(ring: SharedRing, file: int) -> tuple[int, bool]:
    """The file's bytes, and whether they are what was sent. Raises RingError; EOFError where the producer left early."""
    slots = Slots(ring, SLOT)
    for batch in iter(ring.get, b""):
        for offset, slot, length in CHUNK.iter_unpack(batch):
            if not length:
                os.ftruncate(file, offset)
                well = file_digest(file) == bytes(slots[slot][: hashlib.sha256().digest_size])
                ring.put(ANSWER.pack(slot, well))
                return offset, well
            os.pwrite(file, slots[slot][:length], offset)
            ring.put(ANSWER.pack(slot, True))
    raise EOFError("the producer closed the ring before the end of its file")


def file_digest(file: int) -> bytes:
    """Of what is in the file now, not of what we think that we wrote."""
    with open(file, "rb", closefd=False) as stream:
        stream.seek(0)
        return hashlib.file_digest(stream, "sha256").digest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="where to write it")
    parser.add_argument("--name", default=NAME, help="of the ring (default: %(default)s)")
    parser.add_argument("--wait", type=float, default=60, metavar="SECONDS", help="for the producer (default: %(default)g)")
    options = parser.parse_args()
    file = os.open(options.file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with SharedRing.attach(options.name, options.wait) as ring:
            size, well = receive(ring, file)
    except (RingError, OSError, EOFError) as error:
        print(f"consumer: {error}", file=sys.stderr)
        return 1
    finally:
        os.close(file)
    print(f"received {size} bytes, {'checksum right' if well else 'CHECKSUM WRONG'}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
