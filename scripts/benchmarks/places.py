"""Where program.c runs for the rows of syscalls: natively, in a domain, in User Mode Linux, in runsc, or with somebody who
answers for the host's kernel. It is started once in each, and asked over its console.

Each place is on one CPU, all of it: that suits a hand-over between two processes best. Who asks waits asleep meanwhile.
"""

from __future__ import annotations

import atexit
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

from dom0 import ramdisk
from dom0.client import Connection
from scripts.benchmarks.harness import PATIENCE, Absent, Failed, cpus
from scripts.benchmarks.host import Host

HERE = Path(__file__).parent
START, END = 10.0, 3.0  # seconds
FRAMES, MEMORY = 40_960, 48  # of the machine; MiB of a domain
COMPILE = ["gcc", "-std=gnu11", "-O2", "-static", "-Wall", "-Wextra", "-Werror"]


class Place:
    """One running program. It says of a line "WHAT N" how many ns one of N took."""

    def __init__(self) -> None:
        self._text = b""

    def ask(self, what: str, n: int) -> float:
        """ns. Raises Failed."""
        self._write(b"%s %d\n" % (what.encode(), n))
        return self.awaited(what, PATIENCE)

    def awaited(self, what: str, seconds: float) -> float:
        """What it says of `what`. Raises Failed: nothing within so many seconds, or it ended."""
        answer, deadline = re.compile(rb"^= %s ([0-9.]+)\r?\n" % re.escape(what.encode()), re.M), time.monotonic() + seconds
        while not (match := answer.search(self._text)):
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self], [], [], max(0.0, left))
            if not ready:
                raise Failed(f"it does not answer {what}")
            data = self._read()
            if not data:
                raise Failed(f"it ended; it said last: {self._text[-200:].decode(errors='replace').strip()!r}")
            self._text += data
        self._text = self._text[match.end() :]
        return float(match[1])

    def fileno(self) -> int:
        raise NotImplementedError

    def _read(self) -> bytes:
        raise NotImplementedError

    def _write(self, data: bytes) -> None:
        raise NotImplementedError


class Command(Place):
    """By a command of the host's, with pipes for its console."""

    def __init__(self, command: list[str]) -> None:
        super().__init__()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._pidfd = os.pidfd_open(self._process.pid)
        os.sched_setaffinity(self._process.pid, {cpus()[0]})
        atexit.register(self.end)

    def end(self) -> None:
        """At the end of its input it ends by itself; else it is killed, with all of its session. Idempotent."""
        process = self._process
        assert process.stdin and process.stdout
        if process.stdin.closed:
            return
        process.stdin.close()
        select.select([self._pidfd], [], [], END)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(self._pidfd)
        process.stdout.close()

    def fileno(self) -> int:
        assert self._process.stdout
        return self._process.stdout.fileno()

    def _read(self) -> bytes:
        return os.read(self.fileno(), 4096)

    def _write(self, data: bytes) -> None:
        assert self._process.stdin
        try:
            os.write(self._process.stdin.fileno(), data)
        except (BrokenPipeError, ValueError):
            raise Failed("it ended") from None


class Domain(Place):
    """In a domain of the host that all of these share, pinned with its monitor where the hypervisor is."""

    def __init__(self, **config: object) -> None:
        super().__init__()
        one, _ = cpus()
        machine = domains()
        os.sched_setaffinity(machine.pid, {one})
        guest = machine.guest(shlex.join(["/bin/program"]), one, archive(), MEMORY, **config)
        os.sched_setaffinity(machine.connection.ask("info", name=guest.name)["monitor_pid"], {one})
        self._console = Connection(machine.state)
        self._console.ask("console", name=guest.name)
        machine.connection.ask("unpause", name=guest.name)

    def fileno(self) -> int:
        return self._console.fileno()

    def _read(self) -> bytes:
        for message in self._console.messages():
            if "data" in message:
                return bytes(message["data"])
            if "end" in message:
                break
        return b""

    def _write(self, data: bytes) -> None:
        self._console.send({"data": data})


# ---- what is run


@cache
def tree() -> Path:
    """A folder that is a root file system with the program in it, and busybox if there is one that needs no library."""
    folder = Path(tempfile.mkdtemp(prefix="ring1-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("bin", "dev", "proc"):
        (folder / "root" / name).mkdir(parents=True)
    compile(folder / "root/bin/program")
    if has_busybox():
        shutil.copy(str(shutil.which("busybox")), folder / "root/bin/busybox")
    return folder / "root"


def compile(out: Path) -> Path:
    subprocess.run([*COMPILE, "-o", str(out), str(HERE / f"{out.name}.c")], check=True)
    return out


@cache
def has_busybox() -> bool:
    found = shutil.which("busybox")
    if not found:
        return False
    with open(found, "rb") as file:
        return b"/ld-linux" not in file.read(4096)


@cache
def archive() -> Path:
    path = tree().parent / "root.cpio"
    with open(path, "wb") as out:
        ramdisk.build(out, tree())
    return path


@cache
def domains() -> Host:
    return Host(FRAMES)


# ---- the places


@cache
def native() -> Place:
    """Raises Failed."""
    return begun(Command([str(tree() / "bin/program")]))


@cache
def domain(**config: object) -> Place:
    """One whose configuration says this beside what all have. Raises Failed."""
    return begun(Domain(**config))


def begun(place: Place) -> Place:
    place.awaited("ready", START)
    return place


def peer(tool: str, *command: str) -> Place | Absent:
    if not shutil.which(tool):
        return f"{tool} is not installed"
    place = Command([tool, *command])
    try:
        return begun(place)
    except Failed as error:
        place.end()
        return f"{Path(tool).name} does not run here: {error}"


@cache
def user_mode_linux() -> Place | Absent:
    (folder := tree().parent / "uml").mkdir()
    root = ["rootfstype=hostfs", f"rootflags={tree()}", "rw", "init=/bin/program"]
    return peer("linux.uml", f"uml_dir={folder}", "mem=64M", *root, "con=null", "con0=fd:0,fd:1", "quiet")


@cache
def runsc() -> Place | Absent:
    options = ["--platform=ptrace", "--network=none", f"--root={tree().parent / 'runsc'}"]
    return peer("runsc", *options, *([] if os.getuid() == 0 else ["--rootless"]), "do", str(tree() / "bin/program"))


@cache
def intercepted(how: str) -> Place | Absent:
    """Its getpid only, by intercept.c."""
    tool = tree().parent / "intercept"
    return peer(str(tool if tool.exists() else compile(tool)), how, str(tree() / "bin/program"))
