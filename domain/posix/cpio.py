"""Ramdisks: archives in the "newc" format of cpio, unpacked into a file system.

The archive is somebody else's: every number is checked before it is used, and what is wrong is told with its place. A name may
not lead outside: `..` is refused, and a parent that is a link is refused too. Hard links are entries that share device and
inode number; the content comes with one of them.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from domain.posix.errors import Errno
from domain.posix.inode import NAME_MAX, Directory, Inode, Regular

HEADER = 110  # "070701" and thirteen numbers of eight hexadecimal digits
MAGIC = (b"070701", b"070702")  # 070702 has checksums, which Linux does not look at either
TRAILER = b"TRAILER!!!"
MAX_NAME = 4096
MAX_TARGET = 4095
KINDS = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK}


class ArchiveError(Exception):
    """The archive is not one, or cannot be unpacked here: where and why."""


@dataclass(frozen=True, slots=True)
class Entry:
    offset: int
    name: bytes
    mode: int
    uid: int
    gid: int
    links: int
    mtime: int
    identity: tuple[int, int, int]  # of its inode: number, device
    rdev: int
    data: memoryview


def parse(archive: memoryview, offset: int) -> tuple[Entry, int]:
    """One entry and where the next begins."""

    def bad(reason: str) -> ArchiveError:
        return ArchiveError(f"entry at byte {offset}: {reason}")

    header = bytes(archive[offset : offset + HEADER])
    if len(header) < HEADER:
        raise bad("the header is cut off")
    if header[:6] not in MAGIC:
        raise bad(f"magic {header[:6]!r} is not that of a newc archive")
    digits = header[6:]
    if digits.strip(b"0123456789abcdefABCDEF"):
        raise bad("a number is not hexadecimal")
    numbers = [int(digits[at : at + 8], 16) for at in range(0, 104, 8)]
    number, mode, uid, gid, links, mtime, size, major, minor, rmajor, rminor, name_size, _ = numbers
    if not 1 < name_size <= MAX_NAME:
        raise bad(f"a name of {name_size} bytes")
    start = offset + HEADER
    raw = bytes(archive[start : start + name_size])
    if len(raw) < name_size or raw[-1:] != b"\0" or b"\0" in raw[:-1]:
        raise bad("the name is cut off or has no end")
    begin = (start + name_size + 3) & ~3
    if begin + size > len(archive):
        raise bad(f"{size} bytes of content, but the archive ends")
    entry = Entry(
        offset, raw[:-1], mode, uid, gid, links, mtime, (number, major, minor), os.makedev(rmajor & 0xFFF, rminor & 0xFFFFF),
        archive[begin : begin + size],
    )  # fmt: skip
    return entry, (begin + size + 3) & ~3


def unpack(archive: bytes | memoryview, root: Directory) -> int:
    """Everything of the archive below `root`; how many entries. What is there already is kept, files are written anew.

    Raises ArchiveError; what was unpacked until then stays, as the caller throws the file system away."""
    whole = memoryview(archive)
    made: dict[tuple[int, int, int], Inode] = {}
    offset = count = 0
    while offset < len(whole):
        if whole[offset] == 0 and offset % 4 == 0:  # archives may follow each other, with zeros between
            offset += 4
            continue
        entry, offset = parse(whole, offset)
        if entry.name == TRAILER:
            made.clear()
            continue
        try:
            place(entry, root, made)
        except Errno as error:
            raise ArchiveError(f"entry at byte {entry.offset}, {entry.name!r}: {error}") from None
        count += 1
    if not count:
        raise ArchiveError("no entry in it")
    return count


def parent_of(entry: Entry, root: Directory) -> tuple[Directory, bytes]:
    """Where it goes. Parents that the archive has not named are made."""
    parts = [part for part in entry.name.split(b"/") if part not in (b"", b".")]
    if b".." in parts or any(len(part) > NAME_MAX for part in parts):
        raise ArchiveError(f"entry at byte {entry.offset}: the name {entry.name[:80]!r} is refused")
    directory = root
    for part in parts[:-1]:
        inode = directory.lookup(part)
        if inode is None:
            inode = directory.create(part, stat.S_IFDIR | 0o755)
        if not isinstance(inode, Directory):
            raise ArchiveError(f"entry at byte {entry.offset}: {part!r} in {entry.name[:80]!r} is no directory")
        directory = inode
    return directory, parts[-1] if parts else b""


def place(entry: Entry, root: Directory, made: dict[tuple[int, int, int], Inode]) -> None:
    kind = stat.S_IFMT(entry.mode)
    if kind not in KINDS or entry.mode >> 16:
        raise ArchiveError(f"entry at byte {entry.offset}: mode {entry.mode:o} is of no file")
    directory, name = parent_of(entry, root)
    old = directory.lookup(name) if name else root
    inode: Inode | None
    if kind == stat.S_IFDIR:
        inode = old if isinstance(old, Directory) else None
    else:
        if isinstance(old, Directory):
            raise ArchiveError(f"entry at byte {entry.offset}: {entry.name[:80]!r} is a directory already")
        inode = made.get(entry.identity) if entry.links > 1 else None
    if inode is not old and old is not None:
        directory.remove(name)
        old.links -= 1
    if inode is None:
        inode = create(entry, directory, name, kind)
    elif inode is not old:
        directory.add(name, inode)
        inode.links += 1
    if entry.links > 1 and kind != stat.S_IFDIR:
        made[entry.identity] = inode
    if isinstance(inode, Regular) and len(entry.data):
        inode.truncate(0)
        if inode.write(0, entry.data) < len(entry.data):
            raise ArchiveError(f"entry at byte {entry.offset}: no room for {entry.name[:80]!r}")
    inode.mode = kind | stat.S_IMODE(entry.mode)
    inode.uid, inode.gid = entry.uid, entry.gid
    inode.atime = inode.mtime = entry.mtime * 10**9


def create(entry: Entry, directory: Directory, name: bytes, kind: int) -> Inode:
    target = b""
    if kind == stat.S_IFLNK:
        if not 0 < len(entry.data) <= MAX_TARGET or b"\0" in bytes(entry.data):
            raise ArchiveError(f"entry at byte {entry.offset}: a link to nowhere")
        target = bytes(entry.data)
    return directory.create(name, kind | stat.S_IMODE(entry.mode), rdev=entry.rdev, target=target)
