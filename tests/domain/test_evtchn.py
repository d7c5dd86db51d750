"""The guest's drain against the hypervisor's set_pending and unmask, two processes at full speed: no event is lost."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from domain._guest import ffi, lib
from hypervisor import _hv
from hypervisor.public.start_info import SHARED_PENDING_SEL, SHARED_UPCALL_PENDING
from tests.conftest import NIGHTLY, TIMEOUT
from tests.models.mutant import Changes, compile_copies

ROUNDS = 300_000 if NIGHTLY else 15_000
GUEST, HYPERVISOR, HAMMER = "domain/guest.c", "hypervisor/evtchn.c", "tests/domain/hammer.c"
EXCHANGE = "    if (atomic_exchange(&v->upcall_pending, 1))\n        return 0;\n"
TELL = EXCHANGE + "    return atomic_load(&v->upcall_mask) == 0;"
LOOK = "    if (!(atomic_load(&s->pending[port / 64]) & bit))\n        return 0;\n    return mark(s, port);"
PAUSE = "for (int i = 0; i < 2000; i++) __builtin_ia32_pause();"


def hammer(folder: Path, changes: Changes, rounds: int, patience_s: float, by: str) -> subprocess.CompletedProcess[str]:
    program = compile_copies(folder / "hammer", [GUEST, HYPERVISOR, HAMMER], changes, ["-lrt"])
    command = [program, str(rounds), str(int(patience_s * 1000)), by]
    return subprocess.run(command, capture_output=True, text=True, timeout=3 * TIMEOUT, check=False)


@pytest.mark.timeout(4 * TIMEOUT)
@pytest.mark.parametrize("by", ["signal", "descriptor"])
def test_no_event_is_lost(tmp_path: Path, by: str) -> None:
    done = hammer(tmp_path, {}, ROUNDS, TIMEOUT, by)
    assert (done.returncode, done.stdout) == (0, f"{ROUNDS} rounds\n"), done


DEFECTS: dict[str, Changes] = {
    "the selector is taken before the flag is cleared": {
        GUEST: [
            ("    atomic_store(&s->vcpu[0].upcall_pending, 0);\n", ""),
            (
                "    sel = atomic_exchange(&s->vcpu[0].pending_sel, 0);\n",
                "    sel = atomic_exchange(&s->vcpu[0].pending_sel, 0);\n"
                f"    {PAUSE}\n    atomic_store(&s->vcpu[0].upcall_pending, 0);\n",
            ),
        ]
    },
    "a drain that is full forgets the rest": {GUEST: [("atomic_fetch_or(&s->vcpu[0].pending_sel, sel);", ";")]},
    "a drain clears the whole word": {
        GUEST: [("atomic_fetch_and(&s->pending[word], ~((uint64_t)1 << bit));", "atomic_store(&s->pending[word], 0);")]
    },
    "a sleeper leaves upcalls masked": {GUEST: [("if (upcall_unmask(s))\n", "if (0)\n")]},
    "unmasking upcalls does not look": {
        GUEST: [
            (
                "    atomic_store(&v->upcall_mask, 0);\n    return atomic_load(&v->upcall_pending) != 0;",
                f"    {PAUSE}\n    atomic_store(&v->upcall_mask, 0);\n    return 0;",
            )
        ]
    },
    "unmasking a port does not look": {HYPERVISOR: [(LOOK, "    return 0;")]},
    "the upcall mask is read too early": {
        HYPERVISOR: [(TELL, f"    int masked = atomic_load(&v->upcall_mask);\n    {PAUSE}\n{EXCHANGE}    return !masked;")]
    },
    "the selector bit is set after the flag": {
        HYPERVISOR: [
            ("    if (atomic_fetch_or(&v->pending_sel, bit) & bit)\n        return 0;\n", ""),
            (
                TELL,
                "    int edge = !atomic_exchange(&v->upcall_pending, 1) && !atomic_load(&v->upcall_mask);\n"
                f"    {PAUSE}\n    atomic_fetch_or(&v->pending_sel, bit);\n    return edge;",
            ),
        ]
    },
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_seeded_defect_loses_one(tmp_path: Path, defect: str) -> None:
    done = hammer(tmp_path, DEFECTS[defect], 1_000_000, 0.3, "signal")
    assert done.returncode == 1 and "an event was lost" in done.stdout, done


# ---- the drain by itself


def send(page: Any, ports: Iterable[int]) -> list[int]:
    """The hypervisor's side: whether each needs a signal."""
    end = _hv.ffi.new("struct evt_end *", {"shared_info": _hv.ffi.cast("void *", int(ffi.cast("uintptr_t", page)))})
    return [_hv.lib.evtchn_notify(end, port) for port in ports]


def test_a_full_drain_leaves_the_rest_pending_and_said() -> None:
    page = ffi.new("char[4096]")
    send(page, range(1, 200))
    ports, got = ffi.new("uint32_t[]", 50), list[int]()
    while n := lib.upcall_drain(page, ports, 50):
        got += list(ports[0:n])
        left = len(got) < 199
        assert bool(ord(page[SHARED_UPCALL_PENDING])) == left
        assert any(bytes(ffi.buffer(page + SHARED_PENDING_SEL, 8))) == left
    assert got == list(range(1, 200))


def test_ports_are_handed_out_in_order_and_once() -> None:
    page, ports = ffi.new("char[4096]"), ffi.new("uint32_t[]", 4096)
    assert send(page, (4095, 1, 64, 63, 1)) == [1, 0, 0, 0, 0]
    assert [ports[i] for i in range(lib.upcall_drain(page, ports, 4096))] == [1, 63, 64, 4095]
    assert lib.upcall_drain(page, ports, 4096) == 0
