"""Unmodified programs: calls (rows n), processes (f) and memory (p), against the host's kernel and User Mode Linux.

n1 a null call that a function in Python serves; n2 the same from a call site that was patched; n3 one that C answers in the
program's own process; n4 a read of the clock; n5 a byte and a page of a file; f1 fork, exit and wait; f2 with an exec between;
f3 a byte to another process and back; f4 a pipeline of busybox's; p1 and p2 a page touched for the first time, where sixteen
and where sixty-four are made at once.

One program, program.c, does all of it everywhere; n2, n3 and n5 need a domain whose configuration says fast_syscalls.
"""

from __future__ import annotations

from dom0.config import DomainConfig
from scripts.benchmarks import places
from scripts.benchmarks.harness import Absent, Measure, Row
from scripts.benchmarks.places import Place

NATIVE, UML = "the same program, natively", "User Mode Linux"
FAST = "fast_syscalls"


def at(place: Place, what: str, n: int) -> Measure:
    """us of one."""
    return lambda: place.ask(what, n) / 1e3


def of(place: Place | Absent, what: str, n: int) -> Measure | Absent:
    return place if isinstance(place, str) else at(place, what, n)


def fast() -> Place | Absent:
    """A domain that has what makes calls cheap."""
    if FAST not in DomainConfig.__struct_fields__:
        return f"a domain has no {FAST} here"
    return places.domain(**{FAST: True})


def with_clock(place: Place) -> Place | Absent:
    """The same, if programs there are given code that reads the clock."""
    return place if place.ask("vdso", 1) else "programs have no vDSO here"


def rows(quick: bool) -> list[Row]:
    n = 1 if quick else 4
    native, uml, runsc, plain, quicker = places.native(), places.user_mode_linux(), places.runsc(), places.domain(), fast()

    def row(
        id: str, what: str, ask: str, counts: tuple[int, int], place: Place | Absent = plain, gate: float | None = None,
        absolute: bool = False, uml_gate: float | None = None, **more: Measure | Absent,
    ) -> Row:  # fmt: skip
        """counts: how many in a batch of ours and other kernels', and of the host's own."""
        ours, theirs = counts
        peers = {UML: of(uml, ask, ours * n), "runsc, ptrace": of(runsc, ask, ours * n), **more}
        return Row(
            id, what, "us", "less", of(place, ask, ours * n), at(native, ask, theirs * n), NATIVE, peers, gate, absolute,
            {} if uml_gate is None else {UML: uml_gate},
        )  # fmt: skip

    watched = {
        "ptrace, SYSEMU": of(places.intercepted("sysemu"), "null", 300 * n),
        "seccomp, user notification": of(places.intercepted("notify"), "null", 300 * n),
    }
    null = "a null call, served by Python"
    return [
        row("n1", null, "null-unpatched", (500, 10_000), uml_gate=0.5, **watched),
        row("n2", f"{null}, patched", "plain", (500, 10_000), quicker, 60),
        row("n3", "a null call, served by C, patched", "null", (500, 10_000), quicker, 1),
        row("n4", "a read of the clock", "clock", (500, 50_000), with_clock(plain)),
        row("n5-1", "a read of a byte of a file", "read-1", (200, 5000), quicker),
        row("n5-4k", "a read of a page of a file", "read-4k", (100, 2000), quicker),
        row("f1", "fork, exit, wait", "fork", (3, 20), gate=15, uml_gate=1),
        row("f2", "fork, exec, exit, wait", "exec", (2, 10), gate=15, uml_gate=1),
        row("f3", "a byte through a pipe and back", "pipe", (50, 500)),
        row("f4", "seq | sort | md5sum, by busybox", "shell", (1, 1), plain if places.has_busybox() else "no static busybox"),
        row("p1", "a page touched first, sixteen at a time", "touch", (128, 128), gate=12, absolute=True),
        row("p2", "a page touched first, sixty-four at a time", "touch", (1024, 1024), gate=4, absolute=True),
    ]
