"""From a domain that has booted to its first program: file systems, console, process 1.

The ramdisk is a cpio archive in the domain's own frames, where the builder put it; it is unpacked into a ramfs,
which is the root.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from domain.posix import cpio, devices, procfs
from domain.posix.errors import Errno
from domain.posix.exec import execve
from domain.posix.files import FileTable
from domain.posix.inode import Directory
from domain.posix.ramfs import Ramfs
from domain.posix.run import System
from domain.posix.sys_file import open_inode
from domain.posix.task import Process, Task
from domain.posix.tty import Tty
from domain.posix.vfs import FsContext, Vfs, existing

ENVIRONMENT = [b"PATH=/bin:/sbin:/usr/bin:/usr/sbin", b"HOME=/root", b"TERM=vt100"]


class BootError(Exception):
    """There is no first program: one sentence."""


def mount(system: System, ramdisk: bytes | memoryview) -> FsContext:
    """The root from an archive, /dev with the kernel's devices. Raises BootError."""
    root = Ramfs(system.wall_ns)
    vfs = Vfs(system.wall_ns, root)
    try:
        cpio.unpack(ramdisk, root.root)
    except cpio.ArchiveError as error:
        raise BootError(f"the ramdisk: {error}") from None
    context = FsContext(vfs, root.root, root.root)
    for name in (b"dev", b"proc", b"tmp"):
        _directory(root.root, name)
    dev = _directory(root.root, b"dev")
    devices.populate(dev)
    _directory(dev, b"shm").mode |= 0o1777
    vfs.mount(procfs.Procfs(system, vfs), _directory(root.root, b"proc"))
    system.root = root.root
    return context


def _directory(parent: Directory, name: bytes) -> Directory:
    found = parent.lookup(name)
    if found is None:
        found = parent.create(name, 0o40755)
    if not isinstance(found, Directory):
        raise BootError(f"the ramdisk: /{name.decode()} is no directory")
    return found


def attach(system: System, context: FsContext, output: Callable[[bytes], object]) -> Tty:
    """The console as a terminal of the programs."""
    tty = Tty(output, system.kill_group)
    devices.install(context.vfs, tty)
    system.console = tty
    return tty


def first(system: System, context: FsContext, arguments: list[bytes]) -> Process:
    """Process 1, its program loaded, its session the console's. Raises BootError."""
    process = Process(system, None)
    try:
        memory = system.new_memory()
    except Errno as error:
        raise BootError(f"no process for a program: {error.__cause__ or error}") from None
    task = Task(process, memory, FileTable(), context)
    node: Any = existing(task, context, context.root, b"/dev/console")
    file = open_inode(task, node, os.O_RDWR)
    file.path = b"/dev/console"
    for _ in range(3):
        task.files.install(file)
    try:
        execve(task, _find(task, arguments[0]), arguments, ENVIRONMENT)
    except Errno as error:
        raise BootError(f"{arguments[0].decode(errors='replace')}: {error}") from None
    system.ready(task)
    return process


def _find(task: Task, name: bytes) -> bytes:
    """As the shell finds it, in PATH's directories."""
    if b"/" in name:
        return name
    for directory in ENVIRONMENT[0].removeprefix(b"PATH=").split(b":"):
        try:
            existing(task, task.fs, task.fs.root, directory + b"/" + name)
        except Errno:
            continue
        return directory + b"/" + name
    return name
