"""What /proc tells of one process, in Linux's formats (`proc(5)`)."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from typing import Any

from domain.posix import signals
from domain.posix.files import FileTable
from domain.posix.limits import INFINITY, LIMITS, limit
from domain.posix.proc_nodes import Link, Maker, folder, text
from domain.posix.vfs import path_of
from domain.posix.vma import Vma
from hypervisor.public.types import PAGE_SIZE

TICK = 10_000_000  # nanoseconds of a tick in stat: USER_HZ is 100


def of_process(proc: Any, process: Any) -> dict[bytes, Maker]:
    """Its directory; `proc` is the file system."""
    tasks = process.tasks
    made = of_thread(proc, process)
    made[b"task"] = folder(lambda: {b"%d" % task.tid: folder(lambda: of_thread(proc, process)) for task in tasks})
    return made


def of_thread(proc: Any, process: Any) -> dict[bytes, Maker]:
    texts: dict[bytes, Callable[[], bytes]] = {
        b"cgroup": lambda: b"0::/\n",
        b"cmdline": lambda: bytes(process.command_line),
        b"comm": lambda: process.name + b"\n",
        b"environ": lambda: bytes(process.environment),
        b"limits": lambda: limits(process),
        b"maps": lambda: maps(process),
        b"mountinfo": lambda: mountinfo(proc),
        b"mounts": proc.mounts,
        b"oom_score_adj": lambda: b"0\n",
        b"stat": lambda: stat_line(process),
        b"statm": lambda: statm(process),
        b"status": lambda: status(process),
        b"wchan": lambda: b"0",
    }
    made = {name: text(make) for name, make in texts.items()}
    made[b"exe"] = lambda fs: Link(fs, lambda task: process.executable)
    if process.tasks:
        context, table = process.tasks[0].fs, process.tasks[0].files
        made[b"cwd"] = lambda fs: Link(fs, lambda task: path_of(context, context.cwd), lambda: context.cwd)
        made[b"root"] = lambda fs: Link(fs, lambda task: b"/", lambda: context.root)
        made[b"fd"] = folder(lambda: descriptors(table))
        made[b"fdinfo"] = folder(
            lambda: {b"%d" % fd: text(lambda file=file: position(file)) for fd, file in sorted(table.open.items())}  # type: ignore[misc]
        )
    return made


def descriptors(table: FileTable) -> dict[bytes, Maker]:
    def maker(fd: int) -> Maker:
        file = table.open[fd]
        kinds = {stat.S_IFIFO: b"pipe", stat.S_IFSOCK: b"socket"}
        name = file.path or b"%s:[%d]" % (kinds.get(file.inode.kind, b"anon_inode"), file.inode.number)
        return lambda fs: Link(fs, lambda task: name, lambda: file.inode)

    return {b"%d" % fd: maker(fd) for fd in sorted(table.open)}


def state(process: Any) -> bytes:
    if process.exit_status is not None:
        return b"Z"
    if process.stopped:
        return b"T"
    return b"S" if all(task.waiter is not None for task in process.tasks) else b"R"


def pages_of(process: Any) -> int:
    return len(process.tasks[0].memory.pages) if process.tasks else 0


def stat_line(process: Any) -> bytes:
    """Fifty-two fields; those that there is nothing to say about are 0."""
    terminal, size = process.terminal, sum(vma.end - vma.start for vma in areas(process))
    fields = [0] * 52
    fields[3:6] = [process.ppid, process.pgid, process.sid]
    fields[6:8] = [os.makedev(5, 1), terminal.foreground] if terminal else [0, -1]
    fields[13], fields[15] = process.cpu_ns // TICK, process.children_cpu_ns // TICK
    fields[17], fields[18], fields[19] = 20 + process.nice, process.nice, max(1, len(process.tasks))
    fields[21], fields[22], fields[23], fields[24] = process.started_ns // TICK, size, pages_of(process), (1 << 64) - 1
    rest = b" ".join(b"%d" % field for field in fields[3:])
    return b"%d (%s) %s %s\n" % (process.pid, process.name, state(process), rest)


def status(process: Any) -> bytes:
    size, resident = sum(vma.end - vma.start for vma in areas(process)) // 1024, pages_of(process) * 4
    now, tasks = state(process), process.tasks
    pid = b"%d" % process.pid
    words = {b"R": b"running", b"S": b"sleeping", b"T": b"stopped", b"Z": b"zombie"}
    rows = [
        (b"Name", process.name), (b"State", now + b" (" + words[now] + b")"), (b"Tgid", pid), (b"Pid", pid),
        (b"PPid", b"%d" % process.ppid), (b"TracerPid", b"0"), (b"Uid", b"0\t0\t0\t0"), (b"Gid", b"0\t0\t0\t0"),
        (b"FDSize", b"256"), (b"Groups", b"".join(b"%d " % group for group in process.groups)),
        (b"VmSize", b"%8d kB" % size), (b"VmRSS", b"%8d kB" % resident),
        (b"Threads", b"%d" % len(process.tasks)), (b"SigPnd", b"%016x" % (tasks[0].pending.bits if tasks else 0)),
        (b"ShdPnd", b"%016x" % process.pending.bits), (b"SigBlk", b"%016x" % (tasks[0].blocked if tasks else 0)),
        (b"SigIgn", handled(process, signals.SIG_IGN)), (b"SigCgt", handled(process, None)),
        *((name, b"000001ffffffffff") for name in (b"CapPrm", b"CapEff", b"CapBnd")), (b"Cpus_allowed_list", b"0"),
    ]  # fmt: skip
    return b"".join(name + b":\t" + value + b"\n" for name, value in rows)


def handled(process: Any, handler: int | None) -> bytes:
    """Signals with that action, or with a handler of the program's."""
    plain = signals.SIG_DFL, signals.SIG_IGN
    actions = enumerate(action.handler for action in process.actions)
    chosen = (signo for signo, each in actions if signo and (each == handler if handler is not None else each not in plain))
    return b"%016x" % sum(1 << signo - 1 for signo in chosen)


def statm(process: Any) -> bytes:
    size = sum(vma.end - vma.start for vma in areas(process)) // PAGE_SIZE
    shared = sum(vma.file is not None for vma in areas(process))
    return b"%d %d %d 0 0 %d 0\n" % (size, pages_of(process), shared, size)


def limits(process: Any) -> bytes:
    rows = [b"%-26s%-21s%-21s%-10s\n" % (b"Limit", b"Soft Limit", b"Hard Limit", b"Units")]
    for which, (name, unit) in LIMITS.items():
        soft, hard = (b"unlimited" if value == INFINITY else b"%d" % value for value in limit(process, which))
        rows.append(b"%-26s%-21s%-21s%-10s\n" % (name, soft, hard, unit))
    return b"".join(rows)


def mountinfo(proc: Any) -> bytes:
    rows = [line.split() for line in proc.mounts().splitlines()]
    lines = (b"%d 1 0:%d / %s rw,relatime - %s %s rw\n" % (20 + at, at, row[1], row[2], row[0]) for at, row in enumerate(rows))
    return b"".join(lines)


def position(file: Any) -> bytes:
    return b"pos:\t%d\nflags:\t0%o\nmnt_id:\t20\nino:\t%d\n" % (file.offset, file.flags, file.inode.number)


def areas(process: Any) -> Iterable[Vma]:
    return process.tasks[0].memory.areas if process.tasks else ()


def maps(process: Any) -> bytes:
    lines = []
    for vma in areas(process):
        bits = bytes(letter if vma.prot >> bit & 1 else 45 for bit, letter in enumerate(b"rwx"))
        number = vma.file.number if vma.file is not None else 0
        shared = b"s" if vma.shared else b"p"
        line = b"%08x-%08x %s%s %08x 00:00 %d" % (vma.start, vma.end, bits, shared, vma.offset, number)
        label = getattr(vma.file, "label", b"")  # of those that have no name among files
        lines.append(line.ljust(73) + label + b"\n" if label else line + b"\n")
    return b"".join(lines)
