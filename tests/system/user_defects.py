"""Seeded defects of what stands between a program and its kernel: the kernel's half of the hand-over, and the hypervisor's.

The first are in a changed copy of domain/user.c that every guest has; `user.lib.choose(NUMBER)` in one chooses. The others are
of the hypervisor, for the programs of a domain that is called after one of them.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from pathlib import Path
from typing import Any

from cffi import FFI

from tests.models.mutant import ROOT, compile_copies

HEADERS = "ringlib/spin.h", "domain/guest.h"
SOURCES = "domain/guest.c", "domain/user.c"
IN_C = {
    "the frame is where the cell says": 1,
    "vector registers are where the frame says": 2,
    "there are as many as they say": 3,
    "a stack that has moved is not noticed": 4,
    "any turn but the program's is the kernel's": 5,
    "every table of calls is ours": 6,
    "whoever is to come into a frame comes": 7,
}
CHECK = "if (cell.frame != RING1_USER_CONTROL + u->frame || c.fpstate != RING1_USER_CONTROL + u->fpu)"
CHANGES = {
    "domain/user.c": [
        ('#include "ring1_user.h"\n', '#include "ring1_user.h"\nint seeded;\n'),
        ("(void *)(u->control + u->frame)",
         "(void *)(u->control + (seeded == 1 ? *(uint64_t *)(void *)(u->control + 40) - RING1_USER_CONTROL : u->frame))"),
        (CHECK,
         "if (seeded == 2) u->fpu = c.fpstate - RING1_USER_CONTROL;\n"
         "    if (seeded == 3) memcpy(&u->fpu_bytes, u->control + u->fpu + SW_RESERVED + 4, 4);\n"
         f"    if (seeded != 1 && seeded != 2 && seeded != 4) {CHECK}"),
        ("!= RING1_TURN_KERNEL && turn != RING1_TURN_DEAD)",
         "!= RING1_TURN_KERNEL && turn != RING1_TURN_DEAD && (seeded != 5 || turn == RING1_TURN_PROGRAM))"),
        ("return turn_of(u) == RING1_TURN_KERNEL;",
         "return seeded == 5 ? turn_of(u) != RING1_TURN_PROGRAM : turn_of(u) == RING1_TURN_KERNEL;"),
        ("u->native = ", "u->native = seeded == 6 || "),
        ("if (i == FRAME_TRIES)", "if (i == (seeded == 7 ? 120 : FRAME_TRIES))"),
    ],
}  # fmt: skip
LATE_NS = 300_000_000


class Changed:
    """The changed copy with the real module's names; pointers go over as numbers, since the types are another cffi's."""

    def __init__(self, folder: Path) -> None:
        from domain._guest import ffi, lib

        path = compile_copies(folder / "user.so", SOURCES, CHANGES, ["-shared", "-fPIC", f"-I{ROOT}/hypervisor/public", "-lrt"])
        self._real, self._real_ffi, self._ffi = lib, ffi, FFI()
        for header in HEADERS:
            self._ffi.cdef((ROOT / header).read_text().split("/* cdef begin */")[1].split("/* cdef end */")[0])
        self._lib = self._ffi.dlopen(str(path))
        self._seeded = ctypes.c_int.in_dll(ctypes.CDLL(str(path)), "seeded")

    def choose(self, defect: int) -> None:
        self._seeded.value = defect

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("user_"):
            return getattr(self._real, name)
        function = getattr(self._lib, name)
        kinds = self._ffi.typeof(function).args
        return lambda *arguments: function(*map(self._convert, kinds, arguments))

    def _convert(self, kind: Any, value: Any) -> Any:
        is_pointer = isinstance(value, self._real_ffi.CData)
        return self._ffi.cast(kind, int(self._real_ffi.cast("uintptr_t", value))) if is_pointer else value


class Names:
    """The real module's ffi, to which the changed copy is the real one: its functions' addresses are the same labels."""

    def addressof(self, what: Any, *fields: str) -> Any:
        from domain._guest import ffi, lib

        return ffi.addressof(lib if isinstance(what, Changed) else what, *fields)

    def __getattr__(self, name: str) -> Any:
        from domain._guest import ffi

        return getattr(ffi, name)


def in_zygote() -> None:
    """Compiled there, once, before a guest is forked."""
    from hypervisor import zygote

    whole = zygote.main

    def main(fd: int, parent: int) -> None:
        from domain import user

        with tempfile.TemporaryDirectory() as folder:  # what is loaded needs no name any more
            user.lib, user.ffi = Changed(Path(folder)), Names()
        whole(fd, parent)

    zygote.main = main


# ---- those of the hypervisor, by the name of the domain

NOT_FOLLOWED, ENDS_LATER = "not-followed", "ends-later"


def in_hypervisor() -> None:
    from hypervisor import space, user

    follow, fall, gone = space._follow_user, user.fall, user.User.gone

    def not_followed(hv: Any, domain: Any, one: Any, commands: bytearray, count: int) -> Any:
        """An entry that is taken away stays mapped."""
        if domain.name != NOT_FOLLOWED or domain.faulting or one.faulting:
            yield from follow(hv, domain, one, commands, count)

    def later(hv: Any, one: Any, why: str) -> None:
        """The process goes on for a while after the reply that says it is gone."""
        if one.domain.name == ENDS_LATER and why == "destroyed":
            hv.loop.at(time.monotonic_ns() + LATE_NS, lambda: fall(hv, one, why))
        else:
            fall(hv, one, why)

    def at_once(self: Any, resume: Any) -> None:
        if self.domain.name == ENDS_LATER and self.domain.alive:
            resume(None)
        else:
            gone(self, resume)

    space._follow_user, user.fall, user.User.gone = not_followed, later, at_once  # type: ignore[method-assign]
