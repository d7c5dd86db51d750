"""Children: their ends are told, once each; that one is stopped or goes on is nobody's business."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from hypervisor.gate._gate import lib
from hypervisor.loop import Loop
from hypervisor.processes import Children
from tests.conftest import TIMEOUT


def in_a_child(check: Callable[[], None]) -> None:
    """It blocks SIGCHLD for good, so it is done in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            check()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def state(pid: int) -> bytes:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0]


def check_a_stop_is_not_told() -> None:
    loop, ended = Loop(), list[int]()
    children = Children(loop)
    sleeper = subprocess.Popen([sys.executable, "-I", "-c", "import signal; signal.pause()"])
    process = children.adopt(sleeper.pid, lambda: ended.append(1))
    end = time.monotonic() + TIMEOUT
    for number, wanted in ((signal.SIGSTOP, b"T"), (signal.SIGCONT, b"RS")):
        process.signal(number)
        while state(sleeper.pid) not in (wanted[:1], wanted[1:] or wanted[:1]):
            assert time.monotonic() < end
        assert not select.select([children._signalfd], [], [], 0)[0], "somebody has to look"
    process.signal(signal.SIGKILL)
    while not ended:
        assert time.monotonic() < end
        loop.step()
    assert (process.ended, process.by_signal, process.status) == (True, True, signal.SIGKILL) and ended == [1]
    process.close()


def test_that_a_child_is_stopped_or_goes_on_wakes_nobody() -> None:
    in_a_child(check_a_stop_is_not_told)


def test_without_the_flag_it_does() -> None:
    """The seeded defect: SIGCHLD as it is by itself."""

    def check() -> None:
        made = lib.open_signalfd

        class Plain:
            def open_signalfd(self, sig: int, fd: int) -> int:
                number: int = made(sig, fd)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                return number

        import hypervisor.processes as module

        module.lib = Plain()  # type: ignore[attr-defined]
        with pytest.raises(AssertionError, match="somebody has to look"):
            check_a_stop_is_not_told()
        for pid in os.listdir("/proc"):
            if pid.isdigit() and _parent(int(pid)) == os.getpid():
                os.kill(int(pid), signal.SIGKILL)

    in_a_child(check)


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError):
        return 0
