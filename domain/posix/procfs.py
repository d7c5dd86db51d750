"""/proc: what the kernel tells about itself, made when it is read; of processes in proc_process.py.

A file is a function of the kernel. The formats are Linux's (`proc(5)`), as far as ps, top, vmstat, mount and free look.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from domain.posix.inode import Directory, Filesystem, Usage
from domain.posix.proc_nodes import Link, Maker, ProcDirectory, folder, text
from domain.posix.proc_process import TICK, of_process
from domain.posix.vfs import FsContext, Vfs, path_of

PROC_MAGIC = 0x9FA0
CPUINFO = b"processor\t: 0\nvendor_id\t: ring1\nmodel name\t: virtual CPU\ncpu cores\t: 1\n\n"


class Procfs(Filesystem):
    kind = "proc"

    def __init__(self, system: Any, vfs: Vfs, device: int = 4) -> None:
        super().__init__(vfs.now, device)
        self.system, self.vfs = system, vfs
        self.boot_id = str(uuid.uuid4()).encode()
        self.root: Directory = ProcDirectory(self, None, b"", self.entries)

    def usage(self) -> Usage:
        return Usage(PROC_MAGIC)

    def entries(self) -> dict[bytes, Maker]:
        texts: dict[bytes, Callable[[], bytes]] = {
            b"cmdline": lambda: b"\n",
            b"cpuinfo": lambda: CPUINFO,
            b"devices": lambda: b"Character devices:\n  1 mem\n  4 tty\n  5 /dev/console\n\nBlock devices:\n",
            b"diskstats": bytes,
            b"filesystems": lambda: b"nodev\ttmpfs\nnodev\tproc\n",
            b"loadavg": self.loadavg,
            b"meminfo": self.meminfo,
            b"partitions": lambda: b"major minor  #blocks  name\n\n",
            b"stat": self.stat,
            b"swaps": lambda: b"Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n",
            b"uptime": self.uptime,
            b"version": lambda: b"Linux version 6.1.0 (ring1)\n",
            b"vmstat": self.vmstat,
        }
        made: dict[bytes, Maker] = {
            b"mounts": lambda fs: Link(fs, lambda task: b"self/mounts"),
            b"self": lambda fs: Link(fs, lambda task: b"%d" % task.process.pid),
            b"sys": folder(self.sys),
            b"thread-self": lambda fs: Link(fs, lambda task: b"%d/task/%d" % (task.process.pid, task.tid)),
            **{name: text(make) for name, make in texts.items()},
        }
        for pid, process in sorted(self.system.processes.items()):
            made[b"%d" % pid] = folder(lambda process=process: of_process(self, process))  # type: ignore[misc]
        return made

    def sys(self) -> dict[bytes, Maker]:
        """What sysctl tells; nothing of it can be set."""

        def numbers(**values: bytes | int) -> dict[bytes, Maker]:
            rows = {name.encode(): value if isinstance(value, bytes) else b"%d" % value for name, value in values.items()}
            return {name: text(lambda value=value: value + b"\n") for name, value in rows.items()}  # type: ignore[misc]

        kernel = numbers(
            osrelease=b"6.1.0-ring1", ostype=b"Linux", version=b"#1 ring1", pid_max=32768, ngroups_max=65536, cap_last_cap=40,
            randomize_va_space=0, **{"threads-max": 1024},
        )  # fmt: skip
        kernel[b"hostname"] = text(lambda: self.system.hostname + b"\n")
        kernel[b"random"] = folder(
            lambda: {
                b"boot_id": text(lambda: b"%s\n" % self.boot_id),
                b"uuid": text(lambda: str(uuid.uuid4()).encode() + b"\n"),
            }
        )
        fs = numbers(**{"file-max": 65536, "nr_open": 1048576, "pipe-max-size": 1 << 20})
        vm = numbers(overcommit_memory=1, max_map_count=65530, mmap_min_addr=65536)
        return {name: folder(lambda part=part: part) for name, part in ((b"fs", fs), (b"kernel", kernel), (b"vm", vm))}  # type: ignore[misc]

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
        started = (self.system.wall_ns() - self.system.now_ns()) // 10**9
        counts = (busy, idle, busy, idle, self.system.counters["switches"], started, max(self.system.processes, default=0))
        return (
            b"cpu  %d 0 0 %d 0 0 0 0 0 0\ncpu0 %d 0 0 %d 0 0 0 0 0 0\nintr 0\nctxt %d\nbtime %d\nprocesses %d\n"
            b"procs_running 1\nprocs_blocked 0\nsoftirq 0\n" % counts
        )

    def vmstat(self) -> bytes:
        rows = [(b"nr_free_pages", self.system.frames.free), (b"pgfault", self.system.counters["faults"])]
        rows += [(name, 0) for name in b"pgpgin pgpgout pswpin pswpout pgmajfault".split()]
        return b"".join(b"%s %d\n" % row for row in rows)

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
        return path_of(FsContext(self.vfs, self.vfs.root, self.vfs.root), directory)
