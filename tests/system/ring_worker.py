"""One process of the ring stress: serves its ends of many rings, checks every record, prints how many it checked.

    python ring_worker.py SEED RECORDS END...       END: (front|back):(one|two):ID:/NAME, the ring's ways and number

The front makes the ring. With RINGLIB_BUILT in the environment ringlib stands on that shared object (a seeded defect).
"""

from __future__ import annotations

import os
import random
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

from cffi import FFI

from ringlib import SharedRing, WouldBlock, shared

REQUEST = struct.Struct("<II52s")  # ring, sequence, noise; then a u32 checksum of it all
ANSWER = struct.Struct("<III")  # ring, sequence, checksum of the request; likewise
CHECK = struct.Struct("<I")
SIZES = {"one": (64, 0), "two": (64, 16)}
PATIENCE = 20.0  # seconds: for a ring to be made
NAP = 0.001  # seconds: when no end has anything to do


def sealed(body: bytes) -> bytes:
    return body + CHECK.pack(zlib.crc32(body))


def opened(record: bytes, ring: int, sequence: int) -> None:
    body, check = record[:-4], record[-4:]
    assert CHECK.pack(zlib.crc32(body)) == check, f"ring {ring}: record {sequence} is torn"
    assert struct.unpack_from("<II", body) == (ring, sequence), (
        f"ring {ring}: {struct.unpack_from('<II', body)}, not {sequence}"
    )


class Front:
    """Sends `total` records in batches of any size, and wants each answered in order."""

    def __init__(self, name: str, ways: str, ident: int, total: int, dice: random.Random) -> None:
        self.ring = SharedRing.create(name, *SIZES[ways], pages=dice.choice((1, 2, 4)))
        self.two, self.ident, self.total, self.dice = ways == "two", ident, total, dice
        self.sent = self.checked = 0
        self.batch: list[bytes] = []
        self.checks: list[bytes] = []

    def step(self, wait: float) -> bool:
        """Whether anything moved."""
        moved = self.send(wait)
        if self.two:
            return self.collect() or moved
        if self.sent == self.total and self.ring.pending == 0:
            self.checked = self.total
        return moved

    def send(self, wait: float) -> bool:
        if not self.batch and self.sent < self.total:
            n = min(self.dice.randint(1, self.ring.nr_ents), self.total - self.sent)
            noise = self.dice.randbytes(52)
            self.batch = [sealed(REQUEST.pack(self.ident, self.sent + i, noise)) for i in range(n)]
        if not self.batch:
            return False
        try:
            self.ring.put(b"".join(self.batch), wait) if wait else self.ring.publish(b"".join(self.batch))
        except (WouldBlock, TimeoutError):
            return False
        self.checks += [record[-4:] for record in self.batch]
        self.sent += len(self.batch)
        self.batch = []
        return True

    def collect(self) -> bool:
        answers = self.ring.take(self.dice.randint(1, self.ring.nr_ents))
        for at in range(0, len(answers), 16):
            opened(answers[at : at + 16], self.ident, self.checked)
            assert answers[at + 8 : at + 12] == self.checks[self.checked], "an answer to another request"
            self.checked += 1
        return bool(answers)

    @property
    def done(self) -> bool:
        return self.checked == self.total


class Back:
    """Checks what comes, and answers it where the ring goes two ways, until the front closes."""

    def __init__(self, name: str, ways: str, ident: int, dice: random.Random) -> None:
        self.ring = SharedRing.attach(name, PATIENCE)
        self.two, self.ident, self.dice = ways == "two", ident, dice
        self.checked, self.done = 0, False

    def step(self, wait: float) -> bool:
        try:
            batch = self.ring.get(self.dice.randint(1, self.ring.nr_ents), wait)
        except TimeoutError:
            return False
        self.done = not batch
        answers = []
        for at in range(0, len(batch), 64):
            record = batch[at : at + 64]
            opened(record, self.ident, self.checked)
            answers.append(sealed(ANSWER.pack(self.ident, self.checked, *CHECK.unpack(record[-4:]))))
            self.checked += 1
        if self.two and answers:
            self.ring.put(b"".join(answers))
        return True


def serve(seed: int, total: int, specifications: list[str]) -> int:
    """Records checked. Fronts first: their peers wait for them."""
    ends: list[Front | Back] = []
    for kind, ways, ident, name in (text.split(":") for text in sorted(specifications, reverse=True)):
        dice = random.Random(f"{seed} {kind} {ident}")
        if kind == "front":
            ends.append(Front(name, ways, int(ident), total, dice))
        else:
            ends.append(Back(name, ways, int(ident), dice))
    left = list(ends)
    while left:
        moved = [end.step(0) for end in left]
        if not any(moved):
            left[0].step(NAP)
        for end in [end for end in left if end.done]:
            end.ring.close()
            left.remove(end)
    return sum(end.checked for end in ends if isinstance(end, Back))


def stand_on(built: Path) -> None:
    module: Any = shared
    module.ffi = FFI()
    module.ffi.cdef((built.parent / "ringlib.h").read_text().split("/* cdef begin */")[1].split("/* cdef end */")[0])
    module.lib = module.ffi.dlopen(str(built))


if __name__ == "__main__":
    if path := os.environ.get("RINGLIB_BUILT"):
        stand_on(Path(path))
    print(serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
