"""SharedRing with a peer that dies, lies, or takes the memory away."""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import posix_ipc
import psutil
import pytest

from ringlib import Broken, Busy, SharedRing, control, shared
from tests.conftest import NIGHTLY, TIMEOUT
from tests.ringlib.defects import CAUGHT, Edit, seed
from tests.ringlib.peers import SIZE, SOON, both, fork, new_name, process, records

# ---- death


def attach_and_hang(name: str, attached: Any, take: int) -> None:
    ring = SharedRing.attach(name)
    if take:
        ring.get(take, TIMEOUT)
    attached.set()
    signal.pause()


def create_and_hang(name: str, created: Any) -> None:
    ring = SharedRing.create(name, SIZE)
    ring.put(records(0, 3))
    created.set()
    signal.pause()


def check_a_killed_back_is_noticed(patience: float) -> None:
    attached = fork.Event()
    with SharedRing.create(new_name(), SIZE, pages=1) as ring, process(attach_and_hang, ring.name, attached, 0) as child:
        assert attached.wait(TIMEOUT)
        ring.put(records(0, ring.nr_ents))
        with pytest.raises(TimeoutError):
            ring.put(records(0, 1), 2 * shared.LOOK_SECONDS)  # it lives
        child.kill()
        with pytest.raises(Broken, match="died"):
            ring.put(records(0, 1), patience)
        with pytest.raises(Broken, match="died"):
            ring.drain(patience)
        assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, "nobody has waited for it yet"


def test_a_killed_back_is_noticed() -> None:
    check_a_killed_back_is_noticed(TIMEOUT)


def test_a_killed_front_is_noticed_after_what_it_left() -> None:
    name, created = new_name(), fork.Event()
    with process(create_and_hang, name, created) as child:
        assert created.wait(TIMEOUT)
        with SharedRing.attach(name) as ring:
            child.kill()
            assert ring.get(timeout=TIMEOUT) == records(0, 3)
            for timeout in (TIMEOUT, None, 0.001):
                with pytest.raises(Broken, match="died"):
                    ring.get(timeout=timeout)
            child.join()
            with pytest.raises(Broken, match="died"):
                ring.get(timeout=0)
    posix_ipc.unlink_shared_memory(name)


def test_unanswered_requests_are_taken_again_by_the_next_back() -> None:
    attached = fork.Event()
    with SharedRing.create(new_name(), SIZE, SIZE) as ring:
        ring.put(records(0, 5))
        with process(attach_and_hang, ring.name, attached, 3) as child:
            assert attached.wait(TIMEOUT)
            with pytest.raises(Busy):
                SharedRing.attach(ring.name)
            child.kill()
            with pytest.raises(Broken, match="died"):
                ring.get(timeout=TIMEOUT)
            with SharedRing.attach(ring.name) as back:
                assert back.get() == records(0, 5)
                back.put(records(9, 5))
                assert ring.get(timeout=TIMEOUT) == records(9, 5)
                with pytest.raises(TimeoutError):
                    ring.get(timeout=2 * shared.LOOK_SECONDS)  # it lives
            with pytest.raises(Broken, match="closed"):
                ring.put(records(0, 1))
            with SharedRing.attach(ring.name) as back:
                ring.put(records(0, 1))
                assert back.get() == records(0, 1)


def claim(front: SharedRing, pid: int, born: int) -> None:
    os.pwrite(front._fd, control.WHO.pack(pid, born), control.WHO_AT[control.FRONT])


def check_a_later_process_is_told_apart(patience: float) -> None:
    with both() as (front, back):
        pid, born = control.who(front._fd, control.FRONT)
        assert pid == os.getpid() and born > 0
        claim(front, pid, born - 1)
        with pytest.raises(Broken, match="died"):
            back.get(timeout=patience)


def test_a_later_process_of_the_same_number_is_not_the_peer() -> None:
    check_a_later_process_is_told_apart(TIMEOUT)


def test_a_made_up_process_is_not_the_peer() -> None:
    for pid, born in ((0xFFFFFFFF, 0), (0x7FFFFFFF, 0), (os.getpid(), 2**64 - 1)):
        with both() as (front, back):
            claim(front, pid, born)
            with pytest.raises(Broken, match="died"):
                back.get(timeout=TIMEOUT)


# ---- hostile peers


def poke(ring: SharedRing, offset: int, value: int) -> None:
    os.pwrite(ring._fd, struct.pack("<I", value), mmap.PAGESIZE + offset)


@pytest.mark.parametrize("value", [-1, 5 + 65, 1 << 31, 4])
def test_an_impossible_index_breaks_one_ring(value: int) -> None:
    with both(SIZE, SIZE, pages=2) as (front, back), both() as (other, others):
        front.put(records(0, 10))
        back.get(5)
        back.put(records(0, 5))
        front.get(5)
        for ring, offset in ((back, 0), (front, 8)):
            poke(ring, offset, value % (1 << 32))
            for act in (ring.take, ring.get, lambda ring=ring: ring.put(records(0, 1))):
                with pytest.raises(Broken, match="cannot be"):
                    act()
        other.put(records(0, 1))
        assert others.get() == records(0, 1)


def touch_a_shrunk_ring(size: int, act: str) -> None:
    with both(SIZE, SIZE, pages=4) as (front, back):
        posix_ipc.unlink_shared_memory(front.name)  # left by nobody, however this ends
        front.put(records(0, 40))
        os.ftruncate(front._fd, size)
        for _ in range(2):
            with pytest.raises(Broken, match="shrank"):
                if act == "put":
                    front.put(records(0, front.nr_ents - 40))
                elif act == "get":
                    back.get(timeout=SOON)
                elif act == "sleep":
                    front.get(timeout=SOON)
                else:
                    back.put(records(0, 1))


@pytest.mark.parametrize(
    ("size", "act"), [(0, "put"), (0, "get"), (0, "sleep"), (0, "answer"), (mmap.PAGESIZE, "get"), (2 * mmap.PAGESIZE, "put")]
)
def test_a_shrunk_object_is_an_error(size: int, act: str) -> None:
    with process(touch_a_shrunk_ring, size, act):
        pass


def shrink_and_grow(fd: int, size: int) -> None:
    while True:
        os.ftruncate(fd, 0)
        os.ftruncate(fd, size)


def test_a_peer_that_shrinks_and_grows_all_the_time() -> None:
    """Whatever instant it hits, and at whatever touch: Broken, never a signal."""
    for i in range(1000 if NIGHTLY else 40):
        with both(SIZE, SIZE) as (front, back), process(shrink_and_grow, front._fd, os.fstat(front._fd).st_size) as child:
            act = (back.take, front.take, lambda: front.publish(b""), lambda: back.publish(b""))[i % 4]
            end = time.monotonic() + TIMEOUT
            with pytest.raises(Broken, match="shrank"):
                while time.monotonic() < end:
                    act()
            child.kill()


SIGBUS_OF_OTHERS = """
import mmap, os, signal, sys, tempfile
from ringlib import SharedRing

if sys.argv[2] == "handled":
    signal.signal(signal.SIGBUS, lambda number, frame: print("handled"))
ring = SharedRing.create(sys.argv[1], 64)
ring.close()
if sys.argv[2] == "handled":
    os.kill(os.getpid(), signal.SIGBUS)
else:
    with tempfile.TemporaryFile() as file:
        file.truncate(4096)
        memory = mmap.mmap(file.fileno(), 4096)
        file.truncate(0)
        memory[0]
"""


def test_a_bus_error_elsewhere_is_not_ours() -> None:
    def run(what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SIGBUS_OF_OTHERS, new_name(), what]
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)

    assert run("handled").stdout == "handled\n"
    assert run("memory").returncode == -signal.SIGBUS


# ---- what must be noticed


def believes_a_number(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(control, "ended", lambda pidfd: False)  # as kill(pid, 0) says of a zombie
    check_a_killed_back_is_noticed(SOON)


def believes_any_start(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(control, "living", lambda pid, since: os.pidfd_open(pid) if pid else None)
    check_a_later_process_is_told_apart(SOON)


def touch_without_a_guard(size: int, act: str) -> None:
    faulthandler.disable()  # what is about to happen is wanted
    signal.signal(signal.SIGBUS, signal.SIG_DFL)  # the guard of the real module, from another test
    touch_a_shrunk_ring(size, act)


def no_guard(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    seed(monkeypatch, folder, Edit("shared.c", "    guard_install();\n", "    (void)guard_install;\n"))
    with process(touch_without_a_guard, 0, "get"):
        pass


@pytest.mark.parametrize("defect", [believes_a_number, believes_any_start, no_guard])
def test_seeded_defects_are_caught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, defect: Callable[[pytest.MonkeyPatch, Path], None]
) -> None:
    with pytest.raises(CAUGHT):
        defect(monkeypatch, tmp_path)
