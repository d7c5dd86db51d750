"""Resource limits of processes (getrlimit(2)): kept, inherited and told. RLIMIT_NOFILE is enforced, by the table of files."""

from __future__ import annotations

from typing import Any

from domain.posix.vma import STACK_BYTES

RLIMIT_STACK, RLIMIT_CORE, RLIMIT_NPROC, RLIMIT_NOFILE, RLIMIT_MEMLOCK, NR_LIMITS = 3, 4, 6, 7, 8, 16
INFINITY = (1 << 64) - 1
DEFAULTS = {
    RLIMIT_STACK: (STACK_BYTES, INFINITY), RLIMIT_CORE: (0, INFINITY), RLIMIT_NPROC: (1024, 1024), RLIMIT_NOFILE: (1024, 4096),
    13: (0, 0), 14: (0, 0),
}  # fmt: skip
LIMITS = {
    0: (b"Max cpu time", b"seconds"), 1: (b"Max file size", b"bytes"), 2: (b"Max data size", b"bytes"),
    RLIMIT_STACK: (b"Max stack size", b"bytes"), RLIMIT_CORE: (b"Max core file size", b"bytes"),
    5: (b"Max resident set", b"bytes"), RLIMIT_NPROC: (b"Max processes", b"processes"),
    RLIMIT_NOFILE: (b"Max open files", b"files"), RLIMIT_MEMLOCK: (b"Max locked memory", b"bytes"),
    9: (b"Max address space", b"bytes"), 10: (b"Max file locks", b"locks"), 11: (b"Max pending signals", b"signals"),
    12: (b"Max msgqueue size", b"bytes"), 13: (b"Max nice priority", b""), 14: (b"Max realtime priority", b""),
    15: (b"Max realtime timeout", b"us"),
}  # fmt: skip


def limit(process: Any, which: int) -> tuple[int, int]:
    """Soft and hard."""
    found: tuple[int, int] = process.limits.get(which) or DEFAULTS.get(which, (INFINITY, INFINITY))
    return found
