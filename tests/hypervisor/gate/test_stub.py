"""What the gate of applications (stub.c) may ask of the host: five calls with its own arguments. All else: a trap or death."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest

from hypervisor.gate import policy
from hypervisor.public.layout import FD_FAULT
from hypervisor.public.user import USER_CONTROL, USER_GATE
from tests.hypervisor.gate.test_policy import ALLOW, I386, KILL, X86_64, Program, calls, missed_changes

__all__ = ["calls"]  # the fixture

TRAP = 0x30000
X32 = 1 << 30
FAULT_BYTES, NOSIGNAL = 40, 0x4000
INSIDE = (USER_GATE, USER_GATE + 2, USER_GATE + 0x2CD, USER_GATE + 4095)
OUTSIDE = (
    0, 0x400000, USER_GATE - 1, USER_GATE + 4096, USER_GATE + 4097, USER_CONTROL, USER_GATE + (1 << 32), USER_GATE - (1 << 32),
    USER_GATE & 0xFFFFFFFF, USER_GATE | 1 << 47, USER_GATE ^ 1 << 31, 0xFFFFFFFF_FF600000, (1 << 64) - 1,
)  # fmt: skip
ANY, WORD, INT = 0, 0xFFFFFFFF_FFFFFFFF, 0xFFFFFFFF  # the bits of an argument that the host looks at and we compare
Rows = list[tuple[str, tuple[int, ...], tuple[int, ...]]]
ROWS: Rows = [  # call, the arguments it is allowed with, the bits of each that must be these
    ("futex", (USER_CONTROL, 0, 0, 0, 77, 77), (WORD, INT, INT, WORD, ANY, ANY)),  # FUTEX_WAIT while it is the kernel's turn
    ("futex", (USER_CONTROL, 1, 1, 0, 77, 77), (WORD, INT, INT, WORD, ANY, ANY)),  # FUTEX_WAKE of one
    ("sendto", (FD_FAULT, 77, FAULT_BYTES, NOSIGNAL, 0, 77), (INT, ANY, WORD, INT, WORD, ANY)),
    ("recvfrom", (FD_FAULT, 77, 77, NOSIGNAL, 0, 77), (INT, ANY, ANY, INT, WORD, ANY)),
    ("rt_sigreturn", (77,) * 6, (ANY,) * 6),
    ("exit_group", (77,) * 6, (ANY,) * 6),
]
Case = tuple[str, int, tuple[int, ...], int, int, int]  # what, number, arguments, table, where, verdict


def cases(calls: dict[str, int]) -> Iterator[Case]:
    """Those that tell most come first."""
    for name, good, bits in ROWS:
        others = [allowed for call, allowed, _ in ROWS if call == name]
        for where in INSIDE:
            yield name, calls[name], good, X86_64, where, ALLOW
            yield name, calls[name], good, I386, where, TRAP
            yield name, calls[name] | X32, good, X86_64, where, KILL
        for where in OUTSIDE:
            for arch, nr in ((X86_64, calls[name]), (X86_64, calls[name] | X32), (I386, calls[name])):
                yield name, nr, good, arch, where, TRAP
        for i, looked_at in enumerate(bits):
            for bit in range(64):
                args = (*good[:i], good[i] ^ 1 << bit, *good[i + 1 :])
                verdict = KILL if looked_at >> bit & 1 and args not in others else ALLOW
                yield name, calls[name], args, X86_64, INSIDE[bit % 4], verdict
    for i, (name, number) in enumerate([*calls.items(), ("no call", 600), ("no call", 0x1F00)]):
        for args in ((), (77,) * 6, (USER_CONTROL, 77), (FD_FAULT, 77)):
            yield name, number, args, X86_64, INSIDE[i % 4], ALLOW if name in ("rt_sigreturn", "exit_group") else KILL
            yield name, number, args, X86_64, OUTSIDE[i % len(OUTSIDE)], TRAP


def check(program: Program, wanted: list[Case]) -> None:
    for what, number, args, arch, where, verdict in wanted:
        found = program(number, args, arch, where)
        said = f"{what} ({number:#x}) {[hex(a) for a in args]} of {arch:#x} at {where:#x}"
        assert found == verdict, f"{said}: {found:#x}, wanted {verdict:#x}"


def test_every_call_has_the_verdict_of_the_table(calls: dict[str, int]) -> None:
    check(Program(policy.application()), list(cases(calls)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("each", lambda words: [(policy.RETURN, 0, 0, ALLOW)]),  # no argument is looked at
        ("wide", lambda argument, value: [(policy.low(argument), value & 0xFFFFFFFF)]),  # of a pointer only one half
        ("KILL", ALLOW),
        ("KILL", policy.errno_of("EPERM")),  # who jumps to the gate's calls may try again
        ("TRAP", ALLOW),
        ("TRAP", 0x50000 | errno.ENOSYS),  # the host answers, not the kernel
        ("FD_USER_FAULT", FD_FAULT - 1),
        ("FAULT_BYTES", FAULT_BYTES + 1),
        ("USER_GATE", USER_GATE - 4096),
        ("PAGE_SIZE", 2 * 4096),  # the page of commands is the gate's too
        ("USER_CONTROL", USER_CONTROL + 4),  # the word that somebody else waits on
        ("AUDIT_ARCH_X86_64", I386),
    ],
)
def test_a_seeded_hole_is_found(monkeypatch: pytest.MonkeyPatch, calls: dict[str, int], name: str, value: Any) -> None:
    monkeypatch.setattr(policy, name, value)
    with pytest.raises(AssertionError, match="wanted"):
        check(Program(policy.application()), list(cases(calls)))


def test_any_changed_instruction_is_found(calls: dict[str, int]) -> None:
    """But for what is asked twice: another table's number has been refused already, and one of x32 is by not being named."""
    wanted = list(cases(calls))
    code, missed = policy.application(), missed_changes(policy.application(), lambda program: check(program, wanted))
    again = code.index(policy.compile_policy({}, KILL)[:48]) // 8
    assert {at for at, _ in missed} == {again + 2, again + 4}, missed
