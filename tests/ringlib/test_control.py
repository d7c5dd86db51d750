"""The object behind a SharedRing: names, what is a ring, and who may take a name over."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import posix_ipc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringlib import Broken, Busy, SharedRing, control
from tests.conftest import NIGHTLY, TIMEOUT
from tests.ringlib.defects import CAUGHT
from tests.ringlib.peers import SIZE, fork, new_name, process, records

# ---- names


def test_names() -> None:
    name = new_name()
    with pytest.raises(FileNotFoundError):
        SharedRing.attach(name)
    with SharedRing.create(name, SIZE):
        with pytest.raises(FileExistsError):
            SharedRing.create(name, SIZE)
        assert stat.S_IMODE(Path("/dev/shm", name[1:]).stat().st_mode) == 0o600
    with pytest.raises(FileNotFoundError):
        SharedRing.attach(name)
    with SharedRing.create(name, SIZE) as ring:
        posix_ipc.unlink_shared_memory(ring.name)  # somebody else's sweep is no error
    assert os.listdir("/dev/shm").count(name[1:]) == 0


def attach_early(name: str, started: Any) -> None:
    started.set()
    with SharedRing.attach(name, TIMEOUT) as ring:
        ring.put(ring.get(timeout=TIMEOUT))


def test_attach_waits_for_the_ring_to_be_made() -> None:
    name, started = new_name(), fork.Event()
    with pytest.raises(FileNotFoundError):
        SharedRing.attach(name, 0.01)
    with process(attach_early, name, started):
        assert started.wait(TIMEOUT)
        with SharedRing.create(name, SIZE, SIZE) as ring:
            ring.put(records(0, 1))
            assert ring.get(timeout=TIMEOUT) == records(0, 1)


@contextmanager
def an_object(contents: bytes) -> Iterator[str]:
    name = new_name()
    shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX)
    try:
        os.write(shm.fd, contents)
        os.close(shm.fd)
        yield name
    finally:
        posix_ipc.unlink_shared_memory(name)


def test_what_is_not_a_ring() -> None:
    good = control.HEAD.pack(control.MAGIC, SIZE, 0, 1, 0)
    for contents in (b"", bytes(8192)):
        with an_object(contents) as name, pytest.raises(FileNotFoundError, match="not a ring yet"):
            SharedRing.attach(name)
    for contents in (b"#!/bin/sh\n", b"\xff" * 8192, good, good.ljust(4096), good.ljust(12288), b"x" + good.ljust(8191)):
        with an_object(contents) as name, pytest.raises(Broken, match="not a ring"):
            SharedRing.attach(name)
    with an_object(good.ljust(8192, b"\0")) as name:
        SharedRing.attach(name).close()


@given(head=st.tuples(*[st.integers(0, 0xFFFFFFFF) | st.integers(0, 3) | st.sampled_from([64, 4032, 4033, 4096])] * 4))
def test_a_hostile_head_is_refused_or_harmless(head: tuple[int, int, int, int]) -> None:
    with an_object(control.HEAD.pack(control.MAGIC, *head).ljust(3 * mmap.PAGESIZE, b"\0")) as name:
        try:
            with SharedRing.attach(name) as ring:
                assert head[2] + head[3] == 2 and ring.nr_ents * max(head[0], head[1]) < 2 * mmap.PAGESIZE
                assert ring.take() == b""
        except Broken:
            pass


def test_no_room_is_an_error_and_leaves_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        assert (offset, length) == (0, 17 * mmap.PAGESIZE)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    name = new_name()
    with pytest.raises(OSError, match="No space"):
        SharedRing.create(name, SIZE)
    with pytest.raises(FileNotFoundError):
        SharedRing.attach(name)


def test_nothing_is_left_open() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with an_object(b"nothing") as name:
        for act in (SharedRing.attach, lambda name: SharedRing.create(name, SIZE, replace=True)):
            with pytest.raises(Broken):
                act(name)
    with pytest.raises(FileNotFoundError):
        SharedRing.attach(name)
    assert set(os.listdir("/proc/self/fd")) == before


# ---- a name that a dead front left


def left_by_a_dead_front() -> str:
    """The name, and a record in the ring."""
    name = new_name()
    with process(create_and_die, name):
        pass
    return name


def create_and_die(name: str) -> None:
    SharedRing.create(name, SIZE).put(records(0, 1))
    os._exit(0)


def test_a_dead_fronts_ring_is_replaced() -> None:
    name = left_by_a_dead_front()
    with SharedRing.attach(name) as old:
        with pytest.raises(FileExistsError):
            SharedRing.create(name, SIZE)
        with SharedRing.create(name, SIZE, replace=True) as new:
            assert old.get(timeout=TIMEOUT) == records(0, 1)
            with pytest.raises(Broken, match="died"):
                old.get(timeout=TIMEOUT)
            with SharedRing.attach(name) as back:
                new.put(records(5, 2))
                assert back.get(timeout=TIMEOUT) == records(5, 2)
    with SharedRing.create(name, SIZE, replace=True):  # nothing to replace
        pass


def check_a_living_fronts_ring_is_not_replaced() -> None:
    with SharedRing.create(new_name(), SIZE) as ring:
        with pytest.raises(Busy, match="has a front"):
            SharedRing.create(ring.name, SIZE, replace=True).close()
        with SharedRing.attach(ring.name) as back:
            ring.put(records(0, 1))
            assert back.get(timeout=TIMEOUT) == records(0, 1)


def test_a_living_fronts_ring_is_not_replaced() -> None:
    check_a_living_fronts_ring_is_not_replaced()


def test_what_is_not_a_ring_is_not_replaced() -> None:
    for contents in (b"", bytes(8192), b"#!/bin/sh\n", control.HEAD.pack(control.MAGIC, SIZE, 0, 1, 0).ljust(8192, b"\0")):
        with an_object(contents) as name:
            with pytest.raises(Broken, match="not a ring"):
                SharedRing.create(name, SIZE, replace=True)
            assert Path("/dev/shm", name[1:]).read_bytes() == contents


def replace_and_hold(name: str, replaced: Any, refused: Any, stop: Any) -> None:
    try:
        with SharedRing.create(name, SIZE, replace=True):
            replaced.release()
            assert stop.wait(TIMEOUT)
    except Busy:
        refused.release()


def test_of_several_that_replace_at_once_one_wins() -> None:
    """Who comes second finds a living front, whether it looked at the dead one before or not."""
    for _ in range(20 if NIGHTLY else 3):
        name, replaced, refused, stop = left_by_a_dead_front(), fork.Semaphore(0), fork.Semaphore(0), fork.Event()
        with ExitStack() as racers:
            for _ in range(4):
                racers.enter_context(process(replace_and_hold, name, replaced, refused, stop))
            assert replaced.acquire(timeout=TIMEOUT)
            for _ in range(3):
                assert refused.acquire(timeout=TIMEOUT)
            with SharedRing.attach(name):
                pass
            stop.set()


def test_one_that_is_being_made_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A creator in the middle of its work is neither dead nor in the way: who would replace it finds it living, then."""
    name, halfway, go_on = new_name(), threading.Event(), threading.Event()
    allot = os.posix_fallocate

    def slowly(fd: int, offset: int, length: int) -> None:
        halfway.set()
        assert go_on.wait(TIMEOUT)
        allot(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", slowly)
    made: list[SharedRing] = []
    creator = threading.Thread(target=lambda: made.append(SharedRing.create(name, SIZE)))
    creator.start()
    assert halfway.wait(TIMEOUT)
    refused: list[BaseException] = []

    def replace() -> None:
        try:
            SharedRing.create(name, SIZE, replace=True)
        except Busy as error:
            refused.append(error)

    replacer = threading.Thread(target=replace)
    replacer.start()
    go_on.set()
    for thread in (creator, replacer):
        thread.join(TIMEOUT)
    assert len(refused) == 1
    made[0].close()


def test_a_front_unlinks_only_its_own_name() -> None:
    with SharedRing.create(new_name(), SIZE) as ring:
        posix_ipc.unlink_shared_memory(ring.name)
        with SharedRing.create(ring.name, SIZE) as another:
            ring.close()
            with SharedRing.attach(another.name):
                pass


def believes_everybody_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "living", lambda pid, since: None)
    check_a_living_fronts_ring_is_not_replaced()


@pytest.mark.parametrize("defect", [believes_everybody_dead])
def test_seeded_defects_are_caught(monkeypatch: pytest.MonkeyPatch, defect: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.raises(CAUGHT):
        defect(monkeypatch)
