"""For every test: one timeout, Hypothesis' two profiles, and the check that nothing of ours is left behind.

Tests may run in any order and each alone: what a test makes, it ends. A test that waits, waits for a child, an event or
a queue it names, for at most TIMEOUT; it never sleeps.
"""

from __future__ import annotations

import ctypes
import multiprocessing.resource_tracker
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest

TIMEOUT = 30.0  # seconds: every wait in every test; long enough that only a fault reaches it
GRACE = 5.0  # seconds: processes that were told to end are on their way when a test returns
PREFIX = "ring1"  # of every name that ring1 or a test of it creates
NIGHTLY = os.environ.get("RING1_NIGHTLY") == "1"
PR_SET_CHILD_SUBREAPER = 36

hypothesis.settings.register_profile("default", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", max_examples=2000, deadline=None)
hypothesis.settings.load_profile("nightly" if NIGHTLY else "default")


os.environ.pop("CI", None)  # where it is set, pytest prints the whole difference of two disk images: minutes each


def pytest_configure() -> None:
    # What a test starts is ours to the end: a host in the background, and what it left, becomes our child, not init's.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not NIGHTLY:
        for item in items:
            if item.get_closest_marker("nightly"):
                item.add_marker(pytest.mark.skip(reason="RING1_NIGHTLY=1 runs it"))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail the test that leaves a process, shared memory or a queue, and remove it, so that the next one starts clean.

    What fixtures of a wider scope hold (a host shared by a module) was there before and does not count.
    """
    processes, names = set(_children()), _names()
    yield
    leaks = [*_leaked_processes(processes), *_leaked_names(names)]
    assert not leaks, f"left behind: {'; '.join(leaks)}"


def _children() -> list[psutil.Process]:
    tracker = getattr(multiprocessing.resource_tracker._resource_tracker, "_pid", None)  # Python's own, lives on
    return [child for child in psutil.Process().children(recursive=True) if child.pid != tracker]


def _leaked_processes(before: set[psutil.Process]) -> list[str]:
    _, alive = psutil.wait_procs([child for child in _children() if child not in before], timeout=GRACE)
    leaks = []
    for child in alive:
        try:
            leaks.append(f"process {child.pid} ({child.name()}, {child.status()})")
            child.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(alive, timeout=GRACE)
    return leaks


def _names() -> set[Path]:
    """Our user's objects with a name of ring1: shared memory, and queues where they are mounted."""
    mine = set()
    for directory in (Path("/dev/shm"), Path("/dev/mqueue")):
        for path in directory.glob(f"{PREFIX}*") if directory.is_dir() else ():
            try:
                if path.lstat().st_uid == os.getuid():
                    mine.add(path)
            except FileNotFoundError:
                pass
    return mine


def _leaked_names(before: set[Path]) -> list[str]:
    leaks = sorted(_names() - before)
    if leaks:
        others = _held_by_others()
        leaks = [path for path in leaks if path.exists() and f"/{path.name}" not in others]
        for path in leaks:
            path.unlink(missing_ok=True)
    return [str(path) for path in leaks]


def _held_by_others() -> set[str]:
    """Names that processes which are not ours have open: another run of ring1 on this machine, whose they are."""
    held: set[str] = set()
    ours = {os.getpid(), *(child.pid for child in _children())}
    for directory in Path("/proc").glob("[0-9]*"):
        if int(directory.name) in ours:
            continue
        try:
            targets = [os.readlink(entry) for folder in ("fd", "map_files") for entry in (directory / folder).iterdir()]
        except OSError:
            continue  # ended meanwhile, or another user's, whose objects are not ours either
        held.update("/" + Path(target.removesuffix(" (deleted)")).name for target in targets)
    return held
