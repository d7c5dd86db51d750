"""The vDSO: what a C library makes of it, what its calls cost, and what a program can do to its two pages."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from domain.posix import vdso
from domain.posix.accesses import OK
from domain.posix.frames import Frames, PageCache
from domain.posix.memory import Memory
from domain.posix.vdso import Vdso
from hypervisor.public.types import PAGE_SIZE
from tests.domain.posix import programs
from tests.domain.posix.test_memory import Table
from tests.domain.posix.traced import Machine

SOURCE = Path(__file__).with_name("clocks.c")
AT, VDSO = 0x60_0000, 0x60_1000
pytestmark = [pytest.mark.skipif(not Path(programs.BUSYBOX).exists(), reason="needs busybox-static as /bin/busybox")]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    root = tmp_path_factory.mktemp("clocks")
    (root / "bin").mkdir()
    program = str(root / "bin/clocks")
    subprocess.run(["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-static", str(SOURCE), "-o", program], check=True)
    return programs.archive(root)


def calls(disk: bytes, *words: str, clock: bool = True) -> tuple[str, int]:
    """What it printed, and how many system calls it made."""
    result = programs.run(["/bin/clocks", *words], disk, clock=clock)
    return result.output.decode().replace("\r\n", "\n"), result.system.counters["syscalls"]


def test_reading_a_clock_is_no_system_call(disk: bytes) -> None:
    """By the kernel's own count: as many in all for three thousand times the reads."""
    assert calls(disk, "reads", "1")[1] == calls(disk, "reads", "3000")[1]
    assert calls(disk, "reads", "3000")[0] == "done\n"


def test_without_it_every_read_is_one(disk: bytes) -> None:
    output, few = calls(disk, "reads", "1", clock=False)
    _, many = calls(disk, "reads", "101", clock=False)
    assert output == "done\n" and many - few == 100 * (6 + 5)


def test_what_it_has_not_is_asked_of_the_kernel(disk: bytes) -> None:
    output, asked = calls(disk, "others")
    assert output == "-1 -1 0\n" and asked > 10


def test_a_host_whose_cycles_are_no_clock(disk: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypervisor.clock.counter_is_clock", lambda: False)
    output, asked = calls(disk, "reads", "100")
    assert output == "done\n" and asked > 100 * 10


ATTACK = """\
store to the record -11
store to the code -11
run the record -11
a copy of the record 0
without the record -11
time goes on 1
"""


def test_who_attacks_it_dies_alone(disk: bytes) -> None:
    assert calls(disk, "attack")[0] == ATTACK


def test_a_record_that_programs_may_write_is_seen(disk: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeded defect: a shared mapping, writable."""
    whole = Memory.map

    def map_shared(self: Memory, address: int, size: int, prot: int, *rest: Any, **options: Any) -> int:
        shared = getattr(options.get("file"), "label", b"") == b"[vvar]"
        return whole(self, address, size, prot | 2 * shared, *rest, **options | {"shared": shared})

    monkeypatch.setattr(Memory, "map", map_shared)
    assert calls(disk, "attack")[0] == "store to the record 0\n"


def test_proc_names_its_pages(disk: bytes) -> None:
    lines = programs.run(["/bin/cat", "/proc/self/maps"], disk, clock=True).output.decode().splitlines()
    found = [(*(int(word, 16) for word in line.split()[0].split("-")), *line.split()[1::4]) for line in lines if "[" in line]
    begin = found[0][0]
    assert found == [
        (begin, begin + PAGE_SIZE, "r--p", "[vvar]"), (begin + PAGE_SIZE, begin + 2 * PAGE_SIZE, "r-xp", "[vdso]"),
    ]  # fmt: skip


# ---- its frames


def test_all_programs_share_its_frames_and_none_can_have_the_record() -> None:
    machine = Machine(256)
    frames = Frames(machine, machine.base)
    cache = PageCache(frames)
    record = machine.alloc().pfn
    clock = Vdso(cache, record)
    one, two = (Memory(frames, cache, Table()) for _ in range(2))
    assert clock.map(one, AT) == clock.map(two, AT) == VDSO
    child = one.fork(Table())
    code = one.pages[VDSO >> 12] >> 2
    for space in (one, two, child):
        entries = space.table.entries  # type: ignore[attr-defined]
        assert entries[(VDSO >> 12) - 1] == (record, False, False) and entries[VDSO >> 12] == (code, False, True)
    assert one.copy_in(VDSO, len(vdso.IMAGE)) == vdso.IMAGE
    two.protect(VDSO - PAGE_SIZE, PAGE_SIZE, 3)
    assert two.fault(VDSO - PAGE_SIZE, True) == OK
    assert two.pages[(VDSO >> 12) - 1] >> 2 != record, "who writes has a copy"
    for space in (two, child, one):
        space.clear()
    cache.shrink()
    assert set(frames.references) == {record}
    assert record not in frames._free


def test_the_image_is_one_page_that_asks_for_nothing() -> None:
    image = Path(vdso.__file__).with_name("linux-vdso.so.1")
    words = subprocess.run(["readelf", "-lWd", image], capture_output=True, text=True, check=True).stdout
    assert len(vdso.IMAGE) <= PAGE_SIZE
    assert words.count("LOAD") == 1 and "NEEDED" not in words and "RELA" not in words and " RW" not in words
