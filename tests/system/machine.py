"""A real host for tests: its processes in a state directory of their own, and domains that do what a test says.

    machine = Machine()                        hypervisor, zygote, dom0 and its driver domains are up
    alice = machine.guest("alice")             a domain that runs guests/puppet.py
    alice.do("return kernel.domid")            Python, run inside it; its value
    alice.dies("memory.write(0, b'x')")        the same, and how the domain ended
    machine.close()                            all of it ends, and nothing may be left

Nothing here sleeps: a domain's words and its end are messages, a process's end is a descriptor that becomes readable.
`until` looks again and again at what nobody tells us, such as a count.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import posix_ipc

from dom0 import client
from dom0.client import Connection, HostError
from tests.conftest import GRACE, TIMEOUT

FRAMES = 8192  # of a host: 32 MiB
LOOK_SECONDS = 0.005
GUESTS = Path(__file__).parent / "guests"
COUNTS = ("frames_owned", "frames_shared", "grants", "ports", "descriptors", "store_nodes", "devices")
# How a domain ends that touches what is outside its windows:
SEGFAULT = re.compile(r"page fault outside the windows, at 0x[0-9a-f]+, error code 0x6, instruction 0x[0-9a-f]+")
PAGE_FAULT = re.compile(r"page fault at guest address 0x[0-9a-f]+ \((read|write)\): not mapped, and no handler")  # and inside
T = TypeVar("T")


def until(look: Callable[[], T], seconds: float = TIMEOUT) -> T:
    """The first true value of `look()`; its last one where none came in time."""
    end = time.monotonic() + seconds
    while not (value := look()) and time.monotonic() < end:
        select.select([], [], [], LOOK_SECONDS)
    return value


class Process:
    """One process of a host, by a descriptor: its number may be another's once it ended."""

    def __init__(self, pid: int) -> None:
        self.pid, self.fd = pid, os.pidfd_open(pid)

    def kill(self) -> None:
        """SIGKILL, or nothing where it ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, signal.SIGKILL)

    def ended(self, seconds: float = TIMEOUT) -> bool:
        """Waits for its end."""
        return bool(select.select([self.fd], [], [], seconds)[0])

    def memory(self) -> int:
        """Bytes of its own: of machine memory it has mapped whatever it scrubbed."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) << 10

    def close(self) -> None:
        os.close(self.fd)


class Patient(Connection):
    """A connection that waits for an answer, but no longer than TIMEOUT."""

    def __init__(self, state: Path) -> None:
        super().__init__(state)
        self._sock.settimeout(TIMEOUT)

    def close(self) -> None:
        self._sock.close()


class Ended(NamedTuple):
    """How a domain ended: the exit code it said (-1: none), and the reason."""

    exit_code: int
    reason: str


class Silent(AssertionError):
    """A puppet did not answer in time."""


class Refused(Exception):
    """What a puppet's code raised: its class and message."""


class Guest:
    """A domain that obeys its console (guests/puppet.py)."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name
        self.domid: int = machine.row(name)["domid"]
        self._console = machine.connect()
        self._console.ask("console", name=name)
        self._text = b""
        self.printed = ""  # what it said besides its answers

    def begin(self, code: str) -> None:
        """Have it run `code`, the body of a coroutine; `answer` waits for its value."""
        line = base64.b64encode(textwrap.dedent(code).encode()) + b"\n"
        assert len(line) <= 4096, "dom0 keeps no more of what is typed"
        self._console.send({"data": line})

    def answer(self) -> Any:
        """Raises Refused where the code raised, AssertionError where the domain ended instead."""
        while True:
            while b"\n" in self._text:
                line, self._text = self._text.split(b"\n", 1)
                if line.startswith(b"\x02"):
                    kind, value = json.loads(line[1:])
                    if kind == "raised":
                        raise Refused(value)
                    return value
                self.printed += line.decode(errors="replace") + "\n"
            message = next(self._console.messages(), None)
            if message is None:
                raise Silent(f"{self.name} says nothing; it printed {self.printed!r}")
            if "end" in message:
                self._console.close()
                raise AssertionError(f"{self.name} ended: {message['reason']}; it printed {self.printed!r}")
            self._text += message.get("data", b"")

    def do(self, code: str) -> Any:
        self.begin(code)
        return self.answer()

    def speaks(self, code: str, seconds: float) -> bool:
        """Whether it answers in time."""
        self.begin(code)
        self._console._sock.settimeout(seconds)
        try:
            self.answer()
        except Silent:
            return False
        finally:
            self._console._sock.settimeout(TIMEOUT)
        return True

    def type(self, keys: bytes) -> None:
        self._console.send({"data": keys})

    def dies(self, code: str) -> str:
        """Have it run `code`; why it ended."""
        self.begin(code)
        return self.wait().reason

    def wait(self) -> Ended:
        """Until it ended by itself."""
        ended = self.machine.wait(self.name)
        self._console.close()
        return ended

    def row(self) -> dict[str, Any]:
        return self.machine.row(self.name)

    def destroy(self) -> None:
        self._console.close()
        self.machine.ask("destroy", name=self.name)


class Machine:
    """A running host. `seed` names a defect of tests/system/seeds.py that all its processes are born with."""

    def __init__(self, frames: int = FRAMES, seed: str = "") -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ring1-")  # short: a socket's path has 108 bytes
        self.work = Path(self._folder.name)
        self.state = self.work / "state"
        self._open: list[Patient] = []
        self._closed = self._settled = False
        try:
            self.pid = up(self.state, frames, seed)
        except BaseException:
            self._folder.cleanup()
            raise
        self.hypervisor = Process(self.pid)
        self._host = self.connect()

    # ---- asking

    def connect(self) -> Patient:
        """One more connection."""
        connection = Patient(self.state)
        self._open.append(connection)
        return connection

    def ask(self, do: str, **arguments: Any) -> Any:
        """Raises HostError."""
        return self._host.ask(do, **arguments)

    def row(self, name: str) -> dict[str, Any]:
        """Its row in `list`; of several of that name the living one, or the last that lived."""
        rows = [row for row in self.ask("list-domains") if row["name"] == name]
        return next((row for row in rows if row["state"] != "dead"), rows[-1])

    def replaced(self, old: dict[str, Any]) -> bool:
        """Waits until a domain of that name runs that is not the one of the row `old`."""

        def look() -> bool:
            now = self.row(old["name"])
            return bool(now["state"] == "running" and now["domid"] != old["domid"])

        return until(look)

    def wait(self, name: str) -> Ended:
        with Patient(self.state) as connection:
            return Ended(**connection.ask("wait", name=name))

    def books(self) -> dict[str, int]:
        """What the system holds, counted: of each kind that a domain's life needs."""
        rules = self.ask("firewall-list")["text"]  # question and answer have nodes, from the first time on
        if not self._settled:  # and so has the verdict on the first rules, which nobody waits for
            self.ask("firewall-set", text=rules)
            self._settled = True
        book = self.ask("ledger")
        counts = {name: book[name] for name in COUNTS}
        counts |= {name: len(book[name]) for name in ("processes", "queues", "sockets", "domains")}
        counts["dom0_descriptors"] = len(os.listdir(f"/proc/{self.row('dom0')['pid']}/fd"))
        return counts

    def balances(self, before: dict[str, int]) -> dict[str, tuple[int, int]]:
        """{what: (before, now)} of every count that does not come back to what it was; {} is good."""

        def differs() -> dict[str, tuple[int, int]]:
            now = self.books()
            return {name: (before[name], now[name]) for name in before if now[name] != before[name]}

        until(lambda: not differs(), GRACE)
        return differs()

    def processes(self) -> list[Process]:
        """All of them, the hypervisor first. Close them."""
        return [Process(pid) for pid in (self.pid, *self.ask("ledger")["processes"])]

    # ---- domains

    def program(self, source: str, name: str = "guest") -> Path:
        """`source` as a file."""
        path = self.work / f"{name}.py"
        path.write_text(textwrap.dedent(source))
        return path

    def create(self, name: str, kernel: str | Path, *, memory: int = 2, paused: bool = False, **tree: Any) -> int:
        """A domain from a file, or from the source of one; its domid. Raises HostError."""
        path = kernel if isinstance(kernel, Path) else self.program(kernel, name)
        options = {"unfiltered": True} if tree.pop("unfiltered", False) else {}
        made = self.ask("create", tree={"name": name, "kernel": str(path), "memory": memory, **tree}, paused=paused, **options)
        domid: int = made["domid"]
        return domid

    def guest(self, name: str = "guest", **options: Any) -> Guest:
        """A domain that obeys, and has booted."""
        self.create(name, GUESTS / "puppet.py", **options)
        guest = Guest(self, name)
        guest.do("pass")
        return guest

    def disk(self, name: str, size: int = 1 << 20, content: bytes = b"") -> Path:
        """An image file of `size` bytes that begins with `content`."""
        path = self.work / name
        path.write_bytes(content)
        os.truncate(path, size)
        return path

    def holds(self, name: str, at: int, content: bytes) -> bool:
        """Whether a disk has these bytes there."""
        with (self.work / name).open("rb") as image:
            image.seek(at)
            return image.read(len(content)) == content

    # ---- the end

    def close(self) -> None:
        """End it; nothing may be left. Where it is gone already, only what a test holds is let go of. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for connection in self._open:
            connection.close()
        try:
            if not self.hypervisor.ended(0):
                left = self._down()
                assert not left, f"left behind: {', '.join(left)}"
        finally:
            if not self.hypervisor.ended(GRACE):
                self.hypervisor.kill()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self.hypervisor.close()
            self._folder.cleanup()

    def _down(self) -> list[str]:
        with Patient(self.state) as host:
            book = host.ask("ledger")
        processes = [Process(pid) for pid in (self.pid, *book["processes"])]
        names = [line.split()[1] for line in (self.state / "journal").read_text().splitlines()]
        client.down(self.state)
        left = [f"process {process.pid}" for process in processes if not process.ended(GRACE)]
        for process in processes:
            process.close()
        left += [name for name in names if exists(name)]
        return left + [name for name in ("control", "journal") if (self.state / name).exists()]


@contextlib.contextmanager
def machine(frames: int = FRAMES, seed: str = "") -> Iterator[Machine]:
    """A host for one test."""
    host = Machine(frames, seed)
    try:
        yield host
    finally:
        host.close()


def up(state: Path, frames: int = FRAMES, seed: str = "") -> int:
    """Start a host; the hypervisor's pid. Raises HostError."""
    if not seed:
        return client.up(state, frames)
    state.mkdir(mode=0o700, exist_ok=True)
    with client._open_log(state) as log:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", f"from tests.system.seeds import host; host({seed!r})", f"--state={state}",
             f"--frames={frames}"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True,
        )  # fmt: skip
    return client._await_ready(state, process)


def exists(name: str) -> bool:
    """Whether an object of a journal is there, as shared memory or as a queue of our IPC namespace."""
    for kind in (posix_ipc.SharedMemory, posix_ipc.MessageQueue):
        try:
            made = kind(name)
        except posix_ipc.ExistentialError:
            continue
        except posix_ipc.PermissionsError:
            return True
        made.close() if isinstance(made, posix_ipc.MessageQueue) else made.close_fd()
        return True
    return False


__all__ = ["FRAMES", "Ended", "Guest", "HostError", "Machine", "Process", "Refused", "exists", "machine", "until", "up"]
