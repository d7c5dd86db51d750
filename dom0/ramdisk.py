"""Ramdisks for the POSIX kernel: a tree of the host as an archive in cpio's "newc" format.

The same tree gives the same bytes: entries in the order of their names, inode numbers counted, owners root, times as asked for.
Files stream through 1 MiB at a time. Limits of the format: 4 GiB for one file, and names of 4095 bytes.
"""

from __future__ import annotations

import os
import stat
import struct
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

CHUNK = 1 << 20
MAX_FILE = (1 << 32) - 1
MAX_NAME = 4095
TRAILER = b"TRAILER!!!"
ELF_HEADER = struct.Struct("<16s16xQ14xHH")  # e_phoff, e_phentsize, e_phnum of a 64-bit one, from its beginning
PHDR, PT_INTERP = struct.Struct("<IIQQQQ16x"), 3


class RamdiskError(Exception):
    """The tree cannot be packed: which file and why."""


@dataclass(slots=True)
class Writer:
    """Entries one after the other. Parents are to come before what is in them."""

    out: BinaryIO
    mtime: int = 0
    number: int = 0
    written: int = 0
    linked: dict[tuple[int, int], int] = field(default_factory=dict)  # of hard links: host's device and inode -> ours

    def put(self, data: bytes) -> None:
        self.out.write(data)
        self.written += len(data)

    def pad(self) -> None:
        self.put(bytes(-self.written % 4))

    def header(self, name: bytes, mode: int, size: int, *, links: int = 1, number: int = 0, rdev: int = 0) -> None:
        if len(name) > MAX_NAME:
            raise RamdiskError(f"{os.fsdecode(name[:80])}...: the name is longer than {MAX_NAME} bytes")
        if size > MAX_FILE:
            raise RamdiskError(f"{os.fsdecode(name)}: {size} bytes, the format has at most {MAX_FILE}")

        if not number:
            self.number += 1
            number = self.number
        major, minor = os.major(rdev), os.minor(rdev)
        fields = (number, mode, 0, 0, links, self.mtime, size, 0, 0, major, minor, len(name) + 1, 0)
        self.put(b"070701" + b"".join(b"%08x" % word for word in fields) + name + b"\0")
        self.pad()

    def bytes_file(self, name: bytes, mode: int, data: bytes, rdev: int = 0) -> None:
        self.header(name, mode, len(data), rdev=rdev)
        self.put(data)
        self.pad()

    def host_file(self, name: bytes, path: str, info: os.stat_result) -> None:
        """A regular file. One that grows or shrinks meanwhile is an error: its size is already written."""
        key = info.st_dev, info.st_ino
        number = self.linked.get(key, 0)
        if number:
            self.header(name, info.st_mode, 0, links=info.st_nlink, number=number)
            return
        self.header(name, info.st_mode, info.st_size, links=info.st_nlink)
        if info.st_nlink > 1:
            self.linked[key] = self.number
        left = info.st_size
        with open(path, "rb") as source:
            while left:
                data = source.read(min(CHUNK, left))
                if not data:
                    raise RamdiskError(f"{path}: it became shorter while it was read")
                self.put(data)
                left -= len(data)
        self.pad()

    def end(self) -> None:
        self.header(TRAILER, 0, 0, number=self.number + 1)


def walk(top: str, prefix: bytes = b"") -> Iterator[tuple[bytes, str]]:
    """(name in the archive, path on the host), a directory before its content, in the order of the names' bytes."""
    for name in sorted(os.listdir(top), key=os.fsencode):
        path = os.path.join(top, name)
        inside = prefix + os.fsencode(name)
        yield inside, path
        if stat.S_ISDIR(os.lstat(path).st_mode):
            yield from walk(path, inside + b"/")


def add_tree(writer: Writer, top: str) -> int:
    count = 0
    for name, path in walk(top):
        info = os.lstat(path)
        kind = stat.S_IFMT(info.st_mode)
        if kind == stat.S_IFREG:
            writer.host_file(name, path, info)
        elif kind == stat.S_IFLNK:
            writer.bytes_file(name, info.st_mode, os.fsencode(os.readlink(path)))
        elif kind == stat.S_IFSOCK:
            continue  # nobody listens in it there
        else:
            writer.bytes_file(name, info.st_mode, b"", info.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0)
        count += 1
    return count


def applets(busybox: str) -> list[bytes]:
    """Paths of its applets, as it tells them itself. Raises RamdiskError where it does not."""
    try:
        answer = subprocess.run([busybox, "--list-full"], capture_output=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        raise RamdiskError(f"{busybox} does not list its applets: {error}") from None
    paths = sorted({line.strip() for line in answer.stdout.splitlines() if line.strip()})
    if any(b".." in path or path[:1] == b"/" for path in paths):
        raise RamdiskError(f"{busybox} lists applets outside of the tree")
    return [path for path in paths if path not in (b"linuxrc", b"bin/busybox")]


def add_busybox(writer: Writer, busybox: str, taken: set[bytes]) -> int:
    """The binary as bin/busybox, and a link for each applet whose name is not `taken`."""
    links = applets(busybox)
    names = {b"bin/busybox", *links}
    parents = {b"/".join(name.split(b"/")[:depth]) for name in names for depth in range(1, name.count(b"/") + 1)}
    for extra in (b"dev", b"proc", b"tmp", b"root", b"etc"):
        parents.add(extra)
    count = 0
    for parent in sorted(parents - taken):
        writer.bytes_file(parent, stat.S_IFDIR | (0o1777 if parent == b"tmp" else 0o755), b"")
        count += 1
    if b"bin/busybox" not in taken:
        info = os.stat(busybox)
        writer.header(b"bin/busybox", stat.S_IFREG | 0o755, info.st_size)
        with open(busybox, "rb") as source:
            while data := source.read(CHUNK):
                writer.put(data)
        writer.pad()
        count += 1
    for name in links:
        if name not in taken:
            writer.bytes_file(name, stat.S_IFLNK | 0o777, b"/bin/busybox")
            count += 1
    return count


def libraries(program: str) -> list[str]:
    """What a program of the host needs beside itself, as the host's loader finds it: the loader too. None: a static one."""
    loader = interpreter(program)
    if not loader:
        return []
    try:
        answer = subprocess.run([loader, "--list", program], capture_output=True, check=True, timeout=10, text=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise RamdiskError(f"{program}: its libraries are not all to be had: {error}") from None
    lines = (line.partition("=>")[2].split() or line.split() for line in answer.stdout.splitlines())
    return sorted({loader, *(words[0] for words in lines if words and words[0].startswith("/"))})


def interpreter(program: str) -> str:
    """The loader that an ELF program names (PT_INTERP); "": none."""
    with open(program, "rb") as file:
        head = file.read(ELF_HEADER.size)
        if len(head) < ELF_HEADER.size or head[:5] != b"\x7fELF\2":
            return ""
        _, at, size, count = ELF_HEADER.unpack(head)
        file.seek(at)
        table = file.read(size * count)
        for kind, _, offset, _, _, length in (PHDR.unpack_from(table, size * i) for i in range(len(table) // max(size, 56))):
            if kind == PT_INTERP:
                file.seek(offset)
                return os.fsdecode(file.read(length).rstrip(b"\0"))
    return ""


def add_programs(writer: Writer, programs: Iterable[Path], taken: set[bytes]) -> int:
    """Programs of the host, each at its own path, with the libraries that they need; links are followed."""
    files: dict[bytes, str] = {}
    for program in programs:
        path = os.path.abspath(program)
        files |= {os.fsencode(name.lstrip("/")): name for name in (path, *libraries(path))}
    files = {name: path for name, path in files.items() if name not in taken}
    parents = {b"/".join(name.split(b"/")[:depth]) for name in files for depth in range(1, name.count(b"/") + 1)} - taken
    for parent in sorted(parents):
        writer.bytes_file(parent, stat.S_IFDIR | 0o755, b"")
    for name, path in sorted(files.items()):
        writer.host_file(name, path, os.stat(path))
    taken |= parents | files.keys()
    return len(parents) + len(files)


def build(
    out: BinaryIO, tree: Path | None = None, busybox: Path | None = None, mtime: int = 0, programs: Iterable[Path] = ()
) -> tuple[int, int]:
    """Pack a tree, programs of the host, busybox: of two files with one name the first wins. Returns entries and bytes.

    Raises RamdiskError for what cannot be packed, OSError for what cannot be read."""
    writer = Writer(out, mtime)
    count = 0
    taken: set[bytes] = set()
    if tree is not None:
        if not tree.is_dir():
            raise RamdiskError(f"{tree} is no directory")
        count += add_tree(writer, str(tree))
        taken = {name for name, _ in walk(str(tree))}
    count += add_programs(writer, programs, taken)
    if busybox is not None:
        count += add_busybox(writer, str(busybox), taken)
    writer.end()
    return count, writer.written
