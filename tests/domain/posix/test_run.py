"""Unmodified programs in the POSIX kernel, over the stand-in for the mechanism, against what the host says of the same."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from domain._guest import lib
from domain.posix.space import SYSCALL
from domain.posix.spaces import IDLE
from domain.posix.userspace import UserSpace
from tests.domain.posix import programs

SOURCE = Path(__file__).with_name("programs.c")
SCRIPTS = [  # whose output and exit code are the host's
    "echo hello | cat | tr a-z A-Z",
    "(echo inner; exit 3); echo $?",
    "x=$(echo one; echo two | rev); echo \"$x\" | wc -l; echo $x",
    "seq 300 | sort -rn | head -3",
    "cd; mkdir d; echo text >d/f; cp d/f d/g; cat <d/g >>d/f; grep -c text d/f; wc -c d/f; ls -1 d; rm -r d; ls d 2>&1",
    "md5sum </bin/busybox",
    "for i in 1 2 3; do echo $i; done | while read n; do echo $((n * n)); done",
    "sh -c 'kill -SEGV $$' 2>/dev/null; echo $?; sh -c 'kill -TERM $$' 2>/dev/null; echo $?",
    "trap 'echo caught' USR1; kill -USR1 $$; echo after",
    "(sleep 9 & p=$!; kill $p; wait $p; echo $?) 2>/dev/null",
    "yes | head -1; echo ${PIPESTATUS:-none}",
    "exit 7",
    "cat <<X\nhere $((6*7))\nX",
    "awk 'BEGIN { for (i = 0; i < 1000; i++) s += i; print s }'",
    "dd if=/dev/zero bs=4k count=100 2>/dev/null | md5sum",
    "tar cf - -C /bin busybox | gzip -1 | gunzip | tar xOf - | md5sum",
    "nonesuch 2>/dev/null; echo $?",
    "timeout 1 sleep 5 2>/dev/null; echo $?",
    "cat /proc/self/cmdline | tr '\\0' ' '; X=y cat /proc/self/environ | tr '\\0' '\\n' | grep X=; wc -w </proc/self/stat",
    "echo 'cat /proc/$$/comm' >s; chmod +x s; (echo '#!/bin/sh'; cat s) >named; chmod +x named; ./named; rm s named",
    "grep -c ^btime /proc/stat; cat /proc/thread-self/comm; readlink /proc/thread-self | cut -d/ -f2; ls -1 /proc/self/fdinfo",
    "busybox nice -n 5 busybox nice; busybox nice -n 3 sh -c \"cut -d' ' -f18,19 /proc/self/stat\"",
    "wc -w </proc/self/statm; grep -c . /proc/self/limits; cat /proc/sys/kernel/ostype; grep -c Pss /proc/self/status",
]
pytestmark = [
    pytest.mark.skipif(not os.path.exists(programs.BUSYBOX), reason="needs busybox-static as /bin/busybox"),
    pytest.mark.timeout(60),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    (root / "bin").mkdir()
    command = ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", str(SOURCE), "-o"]
    subprocess.run([*command, str(root / "bin/programs")], check=True)
    return root


@pytest.fixture(scope="module")
def disk(folder: Path) -> bytes:
    return programs.archive(folder)


def shell(script: str, disk: bytes) -> tuple[str, int]:
    """Output, and the exit code that a shell would tell of it."""
    result = programs.run(["/bin/sh", "-c", script], disk)
    return result.output.decode().replace("\r\n", "\n"), os.waitstatus_to_exitcode(result.status)


@pytest.mark.parametrize("script", SCRIPTS)
def test_busybox_says_what_it_says_on_the_host(script: str, disk: bytes, tmp_path: Path) -> None:
    assert shell(script, disk) == on_the_host(script, tmp_path)


def on_the_host(script: str, home: Path) -> tuple[str, int]:
    """Output and exit code of the host's own busybox."""
    applets = home / "applets"
    applets.mkdir()
    subprocess.run([programs.BUSYBOX, "--install", "-s", str(applets)], check=True)
    environment = {"PATH": f"{applets}:/bin", "HOME": str(home)}
    done = subprocess.run([programs.BUSYBOX, "sh", "-c", script], capture_output=True, check=False, env=environment)
    return (done.stdout + done.stderr).decode(), done.returncode


@pytest.mark.parametrize("what", ["directed", "threads", "handlers", "identity", "locks", "memory", "timers"])
def test_a_static_glibc_program_says_what_it_says_on_the_host(what: str, folder: Path, disk: bytes) -> None:
    host = subprocess.run([folder / "bin/programs", what], capture_output=True, check=True)
    result = programs.run(["/bin/programs", what], disk)
    assert result.output.replace(b"\r\n", b"\n") == host.stdout
    assert result.status == 0


def test_programs_that_only_compute_share_the_processor(disk: bytes) -> None:
    result = programs.run(["/bin/sh", "-c", "for i in 1 2 3; do programs spin $i & done; wait"], disk)
    turns = [int(line.split()[1]) for line in result.output.splitlines()]
    assert len(turns) == 3
    assert max(turns) < 2 * min(turns), turns
    assert result.system.counters["preemptions"] >= 20


def test_a_wild_store_costs_its_program_alone(disk: bytes) -> None:
    output, code = shell("programs wild; echo $?", disk)
    assert output.splitlines()[-1] == "139"
    assert code == 0


def test_exe_is_the_file_and_comm_the_name_it_was_called_by(disk: bytes) -> None:
    """As on Linux: links are followed for the one and not for the other, which of a script is its own."""
    look = "readlink /proc/$$/exe; cat /proc/$$/comm"
    script = f"{look}; echo '#!/bin/sh' >t; echo '{look}' >>t; chmod +x t; ./t; /proc/self/exe"
    assert shell(script, disk) == ("/bin/busybox\nsh\n/bin/busybox\nt\nexe: applet not found\n", 127)


def test_what_memory_does_not_hold_is_killed_and_said(disk: bytes) -> None:
    result = programs.run(["/bin/sh", "-c", "programs memory; echo $?"], disk, pages=2600)
    lines = result.output.decode().splitlines()
    assert any(line.startswith("out of memory: killed programs[") for line in lines), lines
    assert lines[-1].strip() == "137"


def test_nothing_is_left_of_programs_that_ended(disk: bytes) -> None:
    """Frames that processes held are free; only the cache of files keeps its own."""
    result = programs.run(["/bin/sh", "-c", "for i in 1 2 3 4 5; do (echo $i | cat) >/dev/null; done"], disk)
    result.system.spaces.shrink()
    result.system.cache.shrink()
    assert result.system.frames.used == 0
    assert list(result.system.processes) == [1]
    assert len(result.system.spaces.idle) <= IDLE


def test_a_call_that_comes_while_the_cpu_is_taken_away_is_that_call() -> None:
    """The number is that of this call, not of the last one."""
    space = UserSpace.__new__(UserSpace)
    space._enter = lambda ns: lib.USER_LATE
    space._user = SimpleNamespace(came=lambda kind: SYSCALL, numbers=[39], natives=[1])  # type: ignore[assignment]
    assert space.run(1) == SYSCALL and (space.number, space.native) == (39, True)
