"""/proc: what the kernel tells about itself and its processes, made when it is read.

A file is a function of the kernel; a process's directory is there while the process is. The formats are Linux's
(`proc(5)`), as far as ps, top, mount and free of busybox look.
"""

from __future__ import annotations

import errno
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from domain.posix.errors import Errno
from domain.posix.files import FileTable
from domain.posix.inode import Directory, Filesystem, Inode, Regular, Symlink, Usage
from domain.posix.vfs import Vfs, path_of

PROC_MAGIC = 0x9FA0
TICK = 10_000_000  # nanoseconds of a tick in stat: USER_HZ is 100
Maker = Callable[[Filesystem], Inode]


class Text(Regular):
    """A file whose content is made anew for each read from its beginning."""

    __slots__ = ("content", "make")

    def __init__(self, fs: Filesystem, make: Callable[[], bytes]) -> None:
        super().__init__(fs, 0o444)
        self.make = make
        self.content = b""

    def read(self, offset: int, count: int) -> bytes:
        if not offset:
            self.content = self.make()
        return self.content[offset : offset + count]

    def truncate(self, size: int) -> None:
        raise Errno(errno.EACCES)

    def write(self, offset: int, data: bytes | memoryview) -> int:
        raise Errno(errno.EACCES)


class Link(Symlink):
    """A link whose text depends on who asks, and that may lead to a file without a name."""

    __slots__ = ("tell", "thing")

    def __init__(self, fs: Filesystem, tell: Callable[[Any], bytes], thing: Callable[[], Inode] | None = None) -> None:
        super().__init__(fs, b"")
        self.tell, self.thing = tell, thing

    def text(self, task: Any) -> bytes:
        return self.tell(task)

    def follow(self, task: Any) -> bytes | Inode:
        return self.thing() if self.thing else self.tell(task)


class ProcDirectory(Directory):
    """Entries that are made when they are looked up. Their numbers do not change: they come from the path."""

    __slots__ = ("makers",)

    def __init__(self, fs: Filesystem, parent: Directory | None, name: bytes, makers: Callable[[], dict[bytes, Maker]]) -> None:
        super().__init__(fs, 0o555, parent, name)
        self.makers = makers

    def lookup(self, name: bytes) -> Inode | None:
        maker = self.makers().get(name)
        if maker is None:
            return None
        inode = maker(self.fs)
        inode.number = zlib.crc32(name, self.number)
        if isinstance(inode, Directory):
            inode.parent, inode.name = self, name
        return inode

    def listing(self, after: int) -> Iterator[tuple[int, bytes, int, int]]:
        for index, name in enumerate(self.makers()):
            if index + 3 > after and (inode := self.lookup(name)):
                yield index + 3, name, inode.number, inode.kind >> 12


class Procfs(Filesystem):
    kind = "proc"

    def __init__(self, system: Any, vfs: Vfs, device: int = 4) -> None:
        super().__init__(vfs.now, device)
        self.system, self.vfs = system, vfs
        self.root: Directory = ProcDirectory(self, None, b"", self.entries)

    def usage(self) -> Usage:
        return Usage(PROC_MAGIC)

    def entries(self) -> dict[bytes, Maker]:
        texts: dict[bytes, Callable[[], bytes]] = {
            b"filesystems": lambda: b"nodev\ttmpfs\nnodev\tproc\n",
            b"loadavg": self.loadavg,
            b"meminfo": self.meminfo,
            b"mounts": self.mounts,
            b"stat": self.stat,
            b"uptime": self.uptime,
            b"version": lambda: b"Linux version 6.1.0 (ring1)\n",
        }
        made: dict[bytes, Maker] = {
            b"self": lambda fs: Link(fs, lambda task: b"%d" % task.process.pid),
            b"thread-self": lambda fs: Link(fs, lambda task: b"%d" % task.process.pid),
        }
        for name, make in texts.items():
            made[name] = lambda fs, make=make: Text(fs, make)  # type: ignore[misc]
        for pid, process in sorted(self.system.processes.items()):
            made[b"%d" % pid] = lambda fs, process=process: ProcDirectory(fs, None, b"", lambda: self.of_process(process))  # type: ignore[misc]
        return made

    def uptime(self) -> bytes:
        now = self.system.now_ns()
        busy = sum(process.cpu_ns for process in self.system.processes.values())
        return b"%.2f %.2f\n" % (now / 1e9, max(0, now - busy) / 1e9)

    def loadavg(self) -> bytes:
        total = len(self.system.processes)
        return b"0.00 0.00 0.00 1/%d %d\n" % (total, max(self.system.processes, default=0))

    def stat(self) -> bytes:
        busy = sum(process.cpu_ns for process in self.system.processes.values()) // TICK
        idle = max(0, self.system.now_ns() // TICK - busy)
        return b"cpu  %d 0 0 %d 0 0 0 0 0 0\ncpu0 %d 0 0 %d 0 0 0 0 0 0\n" % (busy, idle, busy, idle)

    def meminfo(self) -> bytes:
        free = self.system.frames.free
        total = free + self.system.frames.used
        rows = [(b"MemTotal", total), (b"MemFree", free), (b"MemAvailable", free)]
        rows += [(name, 0) for name in b"Buffers Cached SwapTotal SwapFree Shmem SReclaimable".split()]
        return b"".join(b"%-16s%8d kB\n" % (name + b":", pages * 4) for name, pages in rows)

    def mounts(self) -> bytes:
        lines = []
        for fs, on in self.vfs.mounts:
            place = b"/" if on is None else self.place(on)
            lines.append(b"%s %s %s rw,relatime 0 0\n" % (fs.source.encode(), place, fs.kind.encode()))
        return b"".join(lines)

    def place(self, directory: Directory) -> bytes:
        from domain.posix.vfs import FsContext

        return path_of(FsContext(self.vfs, self.vfs.root, self.vfs.root), directory)

    # One process

    def of_process(self, process: Any) -> dict[bytes, Maker]:
        texts: dict[bytes, Callable[[], bytes]] = {
            b"cmdline": lambda: bytes(getattr(process, "command_line", b"") or process.name + b"\0"),
            b"comm": lambda: process.name + b"\n",
            b"maps": lambda: maps(process),
            b"mounts": self.mounts,
            b"stat": lambda: stat_line(process),
            b"status": lambda: status(process),
        }
        made: dict[bytes, Maker] = {name: lambda fs, make=make: Text(fs, make) for name, make in texts.items()}  # type: ignore[misc]
        made[b"exe"] = lambda fs: Link(fs, lambda task: process.executable)
        tasks = process.tasks
        if tasks:
            fs_context, table = tasks[0].fs, tasks[0].files
            made[b"cwd"] = lambda fs: Link(fs, lambda task: path_of(fs_context, fs_context.cwd), lambda: fs_context.cwd)
            made[b"root"] = lambda fs: Link(fs, lambda task: b"/", lambda: fs_context.root)
            made[b"fd"] = lambda fs: ProcDirectory(fs, None, b"", lambda: descriptors(table))
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
    terminal = process.terminal
    fields = [0] * 52
    fields[3:6] = [process.ppid, process.pgid, process.sid]
    fields[6:8] = [os.makedev(5, 1), terminal.foreground] if terminal else [0, -1]
    fields[13], fields[15] = process.cpu_ns // TICK, process.children_cpu_ns // TICK
    fields[17], fields[18], fields[19] = 20, 0, max(1, len(process.tasks))
    fields[22], fields[23] = pages_of(process) * 4096, pages_of(process)
    rest = b" ".join(b"%d" % field for field in fields[3:])
    return b"%d (%s) %s %s\n" % (process.pid, process.name, state(process), rest)


def status(process: Any) -> bytes:
    size = b"%8d kB" % (pages_of(process) * 4)
    now = state(process)
    pid = b"%d" % process.pid
    words = {b"R": b"running", b"S": b"sleeping", b"T": b"stopped", b"Z": b"zombie"}
    rows = [
        (b"Name", process.name), (b"State", now + b" (" + words[now] + b")"), (b"Tgid", pid), (b"Pid", pid),
        (b"PPid", b"%d" % process.ppid), (b"TracerPid", b"0"), (b"Uid", b"0\t0\t0\t0"), (b"Gid", b"0\t0\t0\t0"),
        (b"VmSize", size), (b"VmRSS", size), (b"Threads", b"%d" % len(process.tasks)),
    ]  # fmt: skip
    return b"".join(name + b":\t" + value + b"\n" for name, value in rows)


def maps(process: Any) -> bytes:
    if not process.tasks:
        return b""
    lines = []
    for vma in process.tasks[0].memory.areas:
        bits = bytes(letter if vma.prot >> bit & 1 else 45 for bit, letter in enumerate(b"rwx"))
        number = vma.file.number if vma.file is not None else 0
        shared = b"s" if vma.shared else b"p"
        line = b"%08x-%08x %s%s %08x 00:00 %d" % (vma.start, vma.end, bits, shared, vma.offset, number)
        label = getattr(vma.file, "label", b"")  # of those that have no name among files
        lines.append(line.ljust(73) + label + b"\n" if label else line + b"\n")
    return b"".join(lines)
