"""The hypervisor's log and the emergency console of its guests.

The log keeps its newest LOG_BYTES. A guest's bytes are escaped and its share is bounded: GUEST_BYTES a second, the rest is
counted and dropped, so that a flood hides nobody's last words.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from typing import TYPE_CHECKING

from hypervisor.dispatch import hypercall
from hypervisor.domain import Domain
from hypervisor.public import console as abi

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

LOG_BYTES = 64 << 10
GUEST_BYTES = 8 << 10
NEWLINE = b"\n"


class Log:
    def __init__(self, boot_ns: int) -> None:
        self._boot_ns = boot_ns
        self._lines: deque[str] = deque()
        self._bytes = 0
        self._second = 0
        self._said: Counter[int] = Counter()

    def add(self, line: str) -> None:
        """One line, stamped with seconds since boot; also on our standard error, which `up` points at a file."""
        stamped = f"[{(time.monotonic_ns() - self._boot_ns) / 1e9:11.6f}] {line}"
        print(stamped, file=sys.stderr, flush=True)
        self._lines.append(stamped)
        self._bytes += len(stamped) + 1
        while self._bytes > LOG_BYTES:
            self._bytes -= len(self._lines.popleft()) + 1

    def guest(self, domain: Domain, data: bytes) -> None:
        second = time.monotonic_ns() // 1_000_000_000
        if second != self._second:
            self._second = second
            self._said.clear()
        self._said[domain.domid] += len(data)
        if self._said[domain.domid] <= GUEST_BYTES:
            self.add(f"({domain.name}) {escape(data.rstrip(NEWLINE))}")

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def escape(data: bytes) -> str:
    """Printable ASCII as it is, all else as \\xNN: guest bytes never reach a terminal raw."""
    return "".join(chr(b) if 32 <= b < 127 and b != 92 else f"\\x{b:02x}" for b in data)


@hypercall(abi.ConsoleWrite)
def write(hv: Hypervisor, caller: Domain, call: abi.ConsoleWrite) -> None:
    hv.guest_log(caller, call.data)
