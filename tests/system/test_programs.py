"""Programs of Linux in their processes, seen from the host: what such a process asks of it, and what the hypervisor hears."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dom0 import ramdisk
from hypervisor.public.user import MAX_USERS, USER_GATE
from tests.system.machine import Machine, until

BUSYBOX = Path("/bin/busybox")
FRAMES = 24_576  # of the machine
SOURCE = Path(__file__).parents[1] / "domain/posix/programs.c"
pytestmark = pytest.mark.skipif(not BUSYBOX.exists(), reason="needs busybox-static as /bin/busybox")

SCRIPT = """
echo $$; echo one two | tr a-z A-Z | cat; (cd /tmp; echo sub >f; exit 3); echo $?; x=$(seq 9 | sort -rn | head -2); echo $x
cat </tmp/f; md5sum /bin/busybox | cut -c1-8; for i in 1 2 3; do sh -c "exit $i" & done; wait; uname; sleep 0.01; kill -9 $$
"""
WAITS = {"futex", "rt_sigreturn", "sendto", "recvfrom", "exit_group"}
LINE = re.compile(r"^(\d+) +\[([0-9a-f?]+)\] (\S.*)$")


@pytest.fixture(scope="module")
def host() -> Iterator[Machine]:
    host = Machine(FRAMES)
    yield host
    host.close()


@pytest.fixture(scope="module")
def seeded() -> Iterator[Machine]:
    """The host serves getpid itself, and the kernel asks the hypervisor something for each write."""
    host = Machine(FRAMES, seed="system_calls_go_astray")
    yield host
    host.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    (folder / "tree/bin").mkdir(parents=True)
    command = ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", str(SOURCE), "-o"]
    subprocess.run([*command, str(folder / "tree/bin/programs")], check=True)
    out = io.BytesIO()
    ramdisk.build(out, folder / "tree", BUSYBOX)
    (folder / "root.cpio").write_bytes(out.getvalue())
    return folder / "root.cpio"


# ---- what the host hears: strace


class Call(NamedTuple):
    """One that a process made, by where its instruction is, and whether the host answered it with SIGSYS instead."""

    name: str
    address: int
    trapped: bool


@contextlib.contextmanager
def traced(host: Machine, trace: Path) -> Iterator[None]:
    """strace of the zygote of programs and of all that it forks."""
    processes = host.ask("ledger")["processes"]
    (zygote,) = [pid for pid in processes if Path(f"/proc/{pid}/cmdline").read_bytes() == b"ring1/spaces\0"]
    command = ["strace", "-f", "-i", "-q", "-o", str(trace), "-p", str(zygote)]
    status = Path(f"/proc/{zygote}/status")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        try:
            until(lambda: strace.poll() is not None or "TracerPid:\t0" not in status.read_text())
            if strace.poll() is not None:
                assert strace.stderr is not None
                pytest.skip(f"strace may not: {strace.stderr.read()}")
            yield
        finally:
            strace.terminate()


def calls_of(trace: Path) -> dict[int, list[Call]]:
    """By process, those after it has shut itself in."""
    out: dict[int, list[Call]] = {}
    for line in trace.read_text(errors="replace").splitlines():
        found = LINE.match(line)
        if found is None:
            continue
        pid, address, said = int(found[1]), found[2], found[3]
        if said.startswith("seccomp("):
            out[pid] = []
        elif pid not in out or said.startswith(("<...", "+++")):
            pass
        elif said.startswith("---"):
            if "SIGSYS" in said and (name := re.search(r"si_syscall=(?:__NR_)?(\w+)", said)):
                last = out[pid].pop()
                assert last.name == name[1], line
                out[pid].append(last._replace(trapped=True))
        else:
            out[pid].append(Call(re.split(r"\W", said, maxsplit=1)[0], int(address, 16), False))
    return out


def not_its_own(calls: list[Call]) -> list[Call]:
    """What the host did for it that the gate does not ask for. A call under way when it is killed is the last of its list."""
    inside = range(USER_GATE, USER_GATE + 4096)
    return [call for call in calls[:-1] if not call.trapped and not (call.address in inside and call.name in WAITS)]


@pytest.mark.skipif(not Path("/usr/bin/strace").exists(), reason="needs strace")
def test_the_host_sees_only_waiting(host: Machine, root: Path, tmp_path: Path) -> None:
    """A shell script of some twenty processes: whatever they call is a trap, and what the host is asked for is the gate's."""
    with traced(host, tmp_path / "trace"):
        host.create("script", root, memory=48, cmdline=shlex.join(["sh", "-c", SCRIPT]))
        assert host.wait("script").exit_code == 137
    said = (host.state / "console/script.log").read_text()
    assert said.split()[:7] == ["1", "ONE", "TWO", "3", "9", "8", "sub"] and said.split()[-1] == "Linux", said
    traces = calls_of(tmp_path / "trace")
    trapped = {call.name for calls in traces.values() for call in calls if call.trapped}
    assert {"execve", "read", "write", "dup2", "wait4", "getpid", "kill", "exit_group"} <= trapped, trapped
    assert len(traces) >= 3 and trapped & {"open", "openat"} and trapped & {"fork", "vfork", "clone"}, trapped
    for calls in traces.values():
        assert not not_its_own(calls)
        assert {"futex", "rt_sigreturn", "sendto", "recvfrom"} <= {call.name for call in calls if not call.trapped}


@pytest.mark.skipif(not Path("/usr/bin/strace").exists(), reason="needs strace")
def test_a_host_that_answers_a_program_is_seen(seeded: Machine, root: Path, tmp_path: Path) -> None:
    with traced(seeded, tmp_path / "trace"):
        seeded.create("script", root, memory=48, cmdline="sh -c 'echo $$; exit 5'")
        assert seeded.wait("script").exit_code == 5
    assert (seeded.state / "console/script.log").read_text() != "1\n", "its number is the host's"
    assert "getpid" in {call.name for calls in calls_of(tmp_path / "trace").values() for call in not_its_own(calls)}


# ---- address spaces that are lost, or not to be had


def shell(host: Machine, root: Path, script: str) -> tuple[list[str], int]:
    """The lines it printed, and its exit code."""
    log = host.state / "console" / "shell.log"
    before = log.stat().st_size if log.exists() else 0
    host.create("shell", root, memory=48, cmdline=shlex.join(["sh", "-c", script]))
    ended = host.wait("shell")
    assert ended.reason == "poweroff", ended.reason
    return log.read_bytes()[before:].decode().splitlines(), ended.exit_code


def test_spaces_that_were_lost_are_made_again(host: Machine, root: Path) -> None:
    """More of them than a domain may have at a time."""
    lines, code = shell(host, root, f"for i in $(seq {MAX_USERS + 10}); do programs lost; echo $?; done | sort | uniq -c")
    assert code == 0 and lines[-1].split() == [str(MAX_USERS + 10), "137"], lines[-3:]


def test_a_fork_that_gets_no_process_is_an_error(host: Machine, root: Path) -> None:
    many = f"for i in $(seq {MAX_USERS + 9}); do sleep 30 & done"
    lines, code = shell(host, root, f"({many}) 2>&1; kill -9 -1; sleep 0.01; seq 2")
    assert "can't fork" in lines[-3] and lines[-2:] == ["1", "2"] and code == 0, lines[-5:]


# ---- a terminal


class Terminal:
    """The console of a domain, line by line."""

    def __init__(self, host: Machine, name: str) -> None:
        self._console = host.connect()
        self._console.ask("console", name=name)
        self.text = b""

    def until(self, words: bytes) -> None:
        while words not in self.text:
            message = next(self._console.messages(), None)
            assert message is not None and "end" not in message, self.text
            self.text += message.get("data", b"")

    def type(self, keys: bytes) -> None:
        self._console.send({"data": keys})

    def ends(self) -> None:
        """Until its domain does, whose last words are in `text`."""
        while (message := next(self._console.messages(), None)) is not None and "end" not in message:
            self.text += message.get("data", b"")
        self._console.close()


def test_vi_edits_a_file(host: Machine, root: Path) -> None:
    """Raw keys, escape sequences, the size of a terminal, a poll with a time limit: what a full-screen program asks for."""
    host.create("editor", root, memory=48, cmdline=shlex.join(["sh", "-c", "echo old >f; vi f; echo; cat f; exit 4"]))
    terminal = Terminal(host, "editor")
    terminal.until(b"old")
    for keys, seen in ((b"Onew\x1b", b"new"), (b"jA and more\x1b", b"and more"), (b"yyp", b"Put 1")):
        terminal.type(keys)
        terminal.until(seen)
    terminal.type(b":wq\n")
    terminal.ends()
    assert terminal.text.replace(b"\r", b"").endswith(b"\nnew\nold and more\nold and more\n"), terminal.text
    assert host.wait("editor").exit_code == 4


# ---- what the hypervisor hears: its own count


def hypercalls(host: Machine, root: Path, turns: int) -> int:
    """That its domain makes while a program calls getpid, read and write so often; a line from its console included."""
    host.create("caller", root, memory=48, cmdline=f"programs calls {turns}")
    terminal = Terminal(host, "caller")
    terminal.until(b"ready")
    before = host.ask("info", name="caller")["hypercalls"]
    terminal.type(b"\n")
    terminal.until(b"done")
    after = host.ask("info", name="caller")["hypercalls"]
    terminal.type(b"\n")
    terminal.ends()
    assert host.wait("caller").exit_code == 0
    return int(after - before)


def test_system_calls_cost_no_hypercall(host: Machine, root: Path) -> None:
    """Two are the console's. One for each slice that the timer ends would be a few more; but slices end between calls."""
    few, many = hypercalls(host, root, 10), hypercalls(host, root, 10_000)
    assert few <= 8 and many <= few + 8, (few, many)


def test_a_kernel_that_asks_for_each_call_is_seen(seeded: Machine, root: Path) -> None:
    assert hypercalls(seeded, root, 1000) > 1000
