"""Time in domains: the record against the host's clock while others compute, the wall clock, virtual time, accounts."""

from __future__ import annotations

import bisect
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dom0 import ramdisk
from dom0.client import HostError
from hypervisor._hv import ffi, lib
from tests.conftest import TIMEOUT
from tests.domain.posix.test_vdso import ATTACK, SOURCE
from tests.system.machine import Machine, machine, until

US, SECOND = 1000, 10**9
NARROW = 4000  # cycles between two readings of the counter, around one of the clock
SPIN = "async def main(kernel):\n    while True: pass\n"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with one static program."""
    folder = tmp_path_factory.mktemp("clocks")
    (folder / "tree").mkdir()
    subprocess.run(["gcc", "-O1", "-static", str(SOURCE), "-o", str(folder / "tree/clocks")], check=True)
    out = io.BytesIO()
    ramdisk.build(out, folder / "tree")
    (folder / "root.cpio").write_bytes(out.getvalue())
    return folder / "root.cpio"


@pytest.fixture
def busy(host: Machine) -> Iterator[None]:
    """Domains and processes of the host that want every CPU, two for each."""
    count = len(os.sched_getaffinity(0))
    names = [f"busy-{i}" for i in range(count)]
    for name in names:
        host.create(name, SPIN, memory=1)
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    yield
    for process in processes:
        process.kill()
        process.wait()
    for name in names:
        host.ask("destroy", name=name)


def lines(host: Machine, name: str) -> list[str]:
    log = host.state / "console" / f"{name}.log"
    return log.read_text().splitlines() if log.exists() else []


def samples(host: Machine, name: str) -> list[tuple[int, int]]:
    """The host's clock by its cycle counter, again and again until the domain has ended."""
    pair, taken = ffi.new("struct clock_pair *"), []

    def ended() -> bool:
        over = bool(host.row(name)["state"] == "dead")
        lib.clock_sample(pair)
        taken.append((pair.tsc, pair.ns))
        return over

    ended()
    assert until(ended)
    host.wait(name)
    return taken


def errors(rows: list[list[int]], taken: list[tuple[int, int]], boot_ns: int) -> list[int]:
    """How far each reading is from the host's clock at that cycle, ns beyond what the bracket leaves open."""
    found = []
    for before, ns, after in rows:
        i = bisect.bisect(taken, (before, 0))
        (tsc, base), (tsc_next, base_next) = taken[i - 1], taken[i]
        at = [base - boot_ns + (cycle - tsc) * (base_next - base) // (tsc_next - tsc) for cycle in (before, after)]
        found.append(max(at[0] - ns, ns - at[1], 0))
    return found


def run_pairs(host: Machine, disk: Path) -> tuple[list[int], str]:
    host.create("pairs", disk, memory=8, cmdline="/clocks pairs 200 8")
    taken = samples(host, "pairs")
    rows = [[int(word) for word in line.split()] for line in lines(host, "pairs") if line[0].isdigit()]
    rows = [row for row in rows if row[2] - row[0] < NARROW]
    assert len(rows) > 50, "too few that nobody interrupted"
    assert rows[-1][1] - rows[0][1] > SECOND, "three records at least"
    return errors(rows, taken, host.ask("host")["boot_ns"]), lines(host, "pairs")[-1]


@pytest.mark.usefixtures("busy")
def test_a_program_reads_the_hosts_clock_while_others_compute(host: Machine, disk: Path) -> None:
    """Within 1 us, each of two hundred readings, and none of some millions is behind the one before."""
    off, last = run_pairs(host, disk)
    assert max(off) < US, off
    assert last == "backwards 0"


def test_a_record_that_is_two_us_off_is_seen(disk: Path) -> None:
    with machine(seed="clock_two_us_off") as host:
        off, _ = run_pairs(host, disk)
        assert min(off) > US, off


def test_dom0_sets_the_wall_clock_and_programs_see_it(host: Machine, disk: Path) -> None:
    """One that runs, and looks without asking anybody."""
    until_ = 2_000_000_000
    host.create("jump", disk, memory=8, cmdline=f"/clocks jump {until_}")
    try:
        assert until(lambda: lines(host, "jump") == ["waiting"])
        host.ask("set-time", seconds=until_, ns=500)
        assert host.wait("jump").exit_code == 0
        _, real, _, after = lines(host, "jump")[-1].split()
        assert 0 <= int(real) - until_ * SECOND < 5 * SECOND
        assert int(after) < TIMEOUT * SECOND, "real time did not jump"
        with pytest.raises(HostError):
            host.ask("set-time", seconds=-1)
    finally:
        host.ask("set-time", seconds=int(time.time()))


def test_a_program_cannot_write_time(host: Machine, disk: Path) -> None:
    """It dies of it, alone; what others read goes on."""
    host.create("attack", disk, memory=8, cmdline="/clocks attack")
    assert host.wait("attack").exit_code == 0
    assert lines(host, "attack") == ATTACK.splitlines()


def test_virtual_time_stands_still_while_a_domain_is_descheduled(host: Machine) -> None:
    """Capped at a fifth of a CPU, it is stopped again and again: gaps of real time that are none of its virtual time."""
    guest = host.guest("capped", cap=20)
    real, virtual, gaps, across = guest.do("""
        begin = last = kernel.now_ns(), kernel.virtual_ns()
        gaps = across = 0
        while last[0] - begin[0] < 400_000_000:
            now = kernel.now_ns(), kernel.virtual_ns()
            if now[0] - last[0] > 5_000_000:
                gaps, across = gaps + now[0] - last[0], across + now[1] - last[1]
            last = now
        return last[0] - begin[0], last[1] - begin[1], gaps, across
    """)
    guest.destroy()
    assert gaps > real // 2, "it was stopped most of the time"
    assert across < gaps // 50 and virtual < real * 0.25


COUNT = """
    from hypervisor.public.clock import GetRunState
    clocks = lambda: (kernel.now_ns(), kernel.virtual_ns())
    states = lambda: (clocks(), list(kernel.call(GetRunState())), clocks())
    before = states()
    while kernel.now_ns() - before[2][0] < COMPUTE: pass
    await kernel.sleep(SLEEP)
    return before, states()
"""
SLACK = 20_000_000  # ns; a CPU clock is behind by a tick of the host's, at most


def counted(host: Machine, compute: int, sleep: float) -> tuple[int, int, int]:
    """Running, runnable and blocked, ns, of a domain that computes for so long and then sleeps. It may be stopped between two
    readings, so each is held against the clocks before and after it."""
    guest = host.guest("counted")
    before, after = guest.do(COUNT.replace("COMPUTE", str(compute)).replace("SLEEP", str(sleep)))
    guest.destroy()
    running, runnable, blocked, offline = (b - a for a, b in zip(before[1][1:], after[1][1:], strict=True))
    (real, ran), (most, most_ran) = ([x - y for x, y in zip(after[i], before[2 - i], strict=True)] for i in (0, 2))
    assert real - SLACK < running + runnable + blocked + offline < most + SLACK, "each ns is in one of them"
    assert ran - SLACK < running < most_ran + SLACK and offline == 0
    return running, runnable, blocked


def test_what_is_neither_run_nor_waited_for_was_slept(host: Machine) -> None:
    running, runnable, blocked = counted(host, 50_000_000, 0.2)
    assert blocked > 100_000_000, (running, runnable)


@pytest.mark.usefixtures("busy")
def test_what_others_took_is_stolen_time(host: Machine) -> None:
    running, runnable, blocked = counted(host, 300_000_000, 0)
    assert runnable > 30_000_000, (running, blocked)
