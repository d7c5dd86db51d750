"""Archives: what the writer packs the reader unpacks, and a hostile archive is a sentence, not a crash."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import pytest

from dom0 import ramdisk
from domain.posix import cpio
from domain.posix.inode import Directory
from domain.posix.ramfs import Ramfs


def pack(tree: Path) -> bytes:
    out = io.BytesIO()
    ramdisk.build(out, tree)
    return out.getvalue()


def unpacked(archive: bytes, **limits: int) -> Ramfs:
    fs = Ramfs(lambda: 0, **limits)
    cpio.unpack(archive, fs.root)
    return fs


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "bin").mkdir(parents=True)
    (top / "bin" / "tool").write_bytes(os.urandom(10_001))
    (top / "bin" / "tool").chmod(0o4755)
    os.link(top / "bin" / "tool", top / "bin" / "again")
    (top / "link").symlink_to("bin/tool")
    os.mkfifo(top / "pipe", 0o600)
    (top / "empty").touch()
    return top


def test_what_is_packed_is_unpacked(tree: Path) -> None:
    archive = pack(tree)
    assert archive == pack(tree), "the same tree gives the same bytes"
    fs = unpacked(archive)
    directory = fs.root.lookup(b"bin")
    assert isinstance(directory, Directory)
    tool, again = directory.lookup(b"tool"), directory.lookup(b"again")
    assert tool is again and tool is not None and tool.links == 2 and tool.mode & 0o7777 == 0o4755
    assert tool.read(0, 20_000) == (tree / "bin" / "tool").read_bytes()  # type: ignore[attr-defined]
    link = fs.root.lookup(b"link")
    assert link is not None and link.target == b"bin/tool"  # type: ignore[attr-defined]


def test_the_host_s_cpio_makes_archives_we_read(tree: Path) -> None:
    import subprocess

    names = "\n".join([".", "bin", "bin/tool", "bin/again", "link"])
    command = ["/bin/busybox", "cpio", "-o", "-H", "newc"]
    made = subprocess.run(command, input=names.encode(), cwd=tree, capture_output=True, check=True)
    directory = unpacked(made.stdout).root.lookup(b"bin")
    assert isinstance(directory, Directory)
    assert directory.lookup(b"tool").read(0, 20_000) == (tree / "bin" / "tool").read_bytes()  # type: ignore[union-attr]


def entry(name: bytes, /, mode: int = 0o100644, data: bytes = b"", **changes: int) -> bytes:
    fields = dict.fromkeys("ino mode uid gid nlink mtime size maj min rmaj rmin name check".split(), 0)
    fields |= {"ino": 1, "mode": mode, "nlink": 1, "size": len(data), "name": len(name) + 1} | changes
    head = b"070701" + b"".join(b"%08x" % value for value in fields.values()) + name + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (b"", "no entry"),
        (b"070707" + bytes(110), "magic"),
        (entry(b"f")[:50], "cut off"),
        (entry(b"f").replace(b"00000001", b"0000000g", 1), "hexadecimal"),
        (entry(b"f", size=0xFFFFFFFF), "archive ends"),
        (entry(b"f", name=0), "a name of 0"),
        (entry(b"f", name=0xFFFFFFF0), "a name of"),
        (entry(b"../../etc/passwd"), "refused"),
        (entry(b"n" * 256), "refused"),
        (entry(b"f", mode=0o130000), "of no file"),
        (entry(b"l", 0o120777, b"/etc") + entry(b"l/f", data=b"x"), "no directory"),
        (entry(b"d", 0o40755) + entry(b"d", data=b"x"), "directory already"),
        (entry(b"l", 0o120777), "to nowhere"),
        (entry(b"big", data=bytes(40_000)), "no room"),
    ],
)
def test_a_bad_archive_is_a_clear_error(archive: bytes, reason: str) -> None:
    with pytest.raises(cpio.ArchiveError, match=reason):
        unpacked(archive, pages=8, inodes=100)


def test_random_damage_is_always_an_archive_error(tree: Path) -> None:
    archive = pack(tree)
    rng = random.Random(3)
    refused = 0
    for _ in range(400):
        damaged = bytearray(archive)
        for _ in range(rng.choice((1, 1, 3, 20))):
            place = rng.randrange(min(len(damaged), rng.choice((130, 2000, 11_000))))
            damaged[place] = rng.choice((0, 0x30, 0x66, 0xFF, rng.randrange(256)))
        try:
            unpacked(bytes(damaged[: rng.choice((len(damaged), rng.randrange(len(damaged))))]), pages=64, inodes=50)
        except cpio.ArchiveError:
            refused += 1
    assert refused > 100


def test_a_long_chain_of_entries_stops_at_the_limit_of_inodes() -> None:
    with pytest.raises(cpio.ArchiveError, match="No space"):
        unpacked(b"".join(entry(b"f%d" % number) for number in range(20)), inodes=10)
