"""The same operations on the ramfs and on a directory of the host: results and errors must be the same."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from domain.posix import namespace
from domain.posix.errors import Errno
from tests.domain.posix.stand_in import Task

LIBC = ctypes.CDLL(None, use_errno=True)
NAMES = ("a", "b", "c", "d")
ENDS = ("", "", "", "", "/", "/.", "/..", "//")
CHECK = 20
ROUNDS, STEPS = (400, 250) if os.environ.get("RING1_NIGHTLY") else (24, 220)


def path(rng: random.Random) -> str:
    parts = [rng.choice((*NAMES, *NAMES, ".", "..")) for _ in range(rng.choice((1, 1, 2, 2, 3)))]
    return "/".join(parts) + rng.choice(ENDS)


class Host:
    """System calls of the host below one directory, by the names that `Task.call` has; -errno for an error."""

    def __init__(self, top: Path) -> None:
        self.top = os.open(top, os.O_PATH)
        os.chdir(top)

    def raw(self, number: int, *arguments: Any) -> int:
        words = [os.fsencode(word) if isinstance(word, str) else ctypes.c_long(word) for word in arguments]
        result = LIBC.syscall(ctypes.c_long(number), *words)
        return -ctypes.get_errno() if result == -1 else result


NUMBERS = {
    "mkdir": 83, "rmdir": 84, "unlink": 87, "rename": 82, "renameat2": 316, "link": 86, "linkat": 265, "symlink": 88,
    "chmod": 90, "truncate": 76, "access": 21, "mknod": 133, "chdir": 80, "open": 2, "ftruncate": 77, "lseek": 8, "close": 3,
    "fallocate": 285,
}  # fmt: skip
OPEN_FLAGS = (os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_DIRECTORY, os.O_NOFOLLOW, 0o10000000)


def operation(rng: random.Random) -> tuple[str, list[Any]]:
    at = -100
    one: dict[str, Callable[[], list[Any]]] = {
        "mkdir": lambda: [path(rng), 0o755],
        "rmdir": lambda: [path(rng)],
        "unlink": lambda: [path(rng)],
        "rename": lambda: [path(rng), path(rng)],
        "renameat2": lambda: [at, path(rng), at, path(rng), rng.choice((0, 1, 1, 2, 2, 3))],
        "link": lambda: [path(rng), path(rng)],
        "linkat": lambda: [at, path(rng), at, path(rng), rng.choice((0, 0x400))],
        "symlink": lambda: [path(rng).rstrip("/") or ".", path(rng)],
        "chmod": lambda: [path(rng), 0o700 | rng.randrange(0o100)],
        "truncate": lambda: [path(rng), rng.choice((0, 1, 100, 4096, 5000, 100_000, -1))],
        "access": lambda: [path(rng), rng.choice((0, 4, 2, 0o10))],
        "mknod": lambda: [path(rng), rng.choice((0, stat.S_IFREG, stat.S_IFIFO, stat.S_IFDIR)) | 0o600, 0],
        "open": lambda: [path(rng), rng.choice((0, 1, 2)) | sum(flag for flag in OPEN_FLAGS if rng.random() < 0.25), 0o640],
    }
    weights = {"mkdir": 3, "open": 4, "symlink": 2, "rename": 3, "renameat2": 2}
    name = rng.choices(list(one), [weights.get(name, 1) for name in one])[0]
    return name, one[name]()


def facts(info: tuple[int, ...]) -> tuple[int, ...]:
    """What both stats must agree on: mode, links, and the size of all but directories."""
    mode, links, size = info
    return (mode, links, 0 if stat.S_ISDIR(mode) else size)


def host_tree() -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for top, directories, files in os.walk(b"."):
        for name in directories + files:
            place = os.path.join(top, name)
            info = os.lstat(place)
            content: Any = None
            if stat.S_ISREG(info.st_mode):
                content = Path(os.fsdecode(place)).read_bytes()
            elif stat.S_ISLNK(info.st_mode):
                content = os.readlink(place)
            tree[os.fsdecode(place)] = (facts((info.st_mode, info.st_nlink, info.st_size)), content)
    return tree


def our_tree(task: Task) -> dict[str, Any]:
    tree: dict[str, Any] = {}

    def visit(directory: Any, prefix: str) -> None:
        for _, name, _, _ in directory.listing(2):
            inode = directory.lookup(name)
            place = f"{prefix}/{name.decode()}"
            content: Any = None
            if stat.S_ISREG(inode.mode):
                content = inode.read(0, inode.size)
            elif stat.S_ISLNK(inode.mode):
                content = inode.target
            tree[place] = (facts((inode.mode, inode.links, inode.size)), content)
            if stat.S_ISDIR(inode.mode):
                visit(inode, place)

    visit(task.fs.cwd, ".")
    return tree


@pytest.fixture
def pair(tmp_path: Path) -> Any:
    """The host's directory is deep enough that no path of the test leads out of what is its own."""
    was, mask = os.getcwd(), os.umask(0o022)
    deep = tmp_path / "x" / "y" / "z" / "v" / "w"
    deep.mkdir(parents=True)
    task = Task()
    for place in ("/x", "/x/y", "/x/y/z", "/x/y/z/v", "/x/y/z/v/w"):
        assert task.call("mkdir", place, 0o755) == 0
    assert task.call("chdir", "/x/y/z/v/w") == 0
    host = Host(deep)
    yield task, host
    os.close(host.top)
    os.chdir(was)
    os.umask(mask)


def compare(task: Task, host: Host, seed: int, steps: int) -> None:
    rng = random.Random(seed)
    log = []
    for step in range(steps):
        name, arguments = operation(rng)
        if name == "open" and not arguments[1] & os.O_NONBLOCK:
            arguments[1] |= os.O_NONBLOCK  # of a FIFO: answers at once
        theirs = host.raw(NUMBERS[name], *arguments)
        ours = task.call(name, *arguments)
        log.append((name, arguments, ours))
        if name == "open" and theirs >= 0 and ours >= 0:
            write(task, theirs, ours, rng, log)
            os.close(theirs)
            assert task.call("close", ours) == 0
            ours = theirs = 0
        said = " / ".join(errno.errorcode.get(-answer, str(answer)) for answer in (ours, theirs))
        assert ours == theirs, f"seed {seed}, step {step}: {name}{tuple(arguments)}: ours / host's {said}; {log[-8:]}"
        if step % CHECK == CHECK - 1:
            assert our_tree(task) == host_tree(), f"seed {seed}, step {step}: {log[-20:]}"


def write(task: Task, theirs: int, ours: int, rng: random.Random, log: list[Any]) -> None:
    """What an open file does: a few writes, seeks, reads."""
    for _ in range(3):
        data = rng.randbytes(rng.choice((0, 1, 10, 4096, 9000)))
        offset = rng.choice((-5, 0, 3, 4095, 20_000))
        kind = rng.choice(("write", "read", "pwrite", "seek", "ftruncate"))
        try:
            if kind == "write":
                want: Any = os.write(theirs, data)
            elif kind == "read":
                want = os.read(theirs, 5000)
            elif kind == "pwrite":
                want = os.pwrite(theirs, data, offset)
            elif kind == "seek":
                want = os.lseek(theirs, offset, rng.choice((0, 1, 2)))
            else:
                os.ftruncate(theirs, offset)
                want = 0
        except OSError as error:
            want = -(error.errno or 0)
        if kind == "seek":
            if want >= 0:
                assert task.call("lseek", ours, want, 0) == want
            continue
        buffer = task.memory.put(data)
        if kind == "write":
            got: Any = task.call("write", ours, buffer, len(data))
        elif kind == "read":
            got = task.read(ours, 5000)
        elif kind == "pwrite":
            got = task.call("pwrite64", ours, buffer, len(data), offset)
        else:
            got = task.call("ftruncate", ours, offset)
        assert got == want, f"{kind} of {len(data)} at {offset}: {log[-3:]}"


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_the_host_does_the_same(pair: Any, seed: int) -> None:
    compare(*pair, seed, STEPS)


def test_the_comparison_finds_a_defect(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded: rmdir that forgets to look whether the directory is empty."""

    def careless(found: Any) -> None:
        directory = namespace.as_directory(found.file())
        if not found.name:
            raise Errno(errno.EINVAL)
        found.directory.remove(found.name)
        namespace.bury(directory)

    monkeypatch.setattr(namespace, "rmdir", careless)
    with pytest.raises(AssertionError):
        for seed in range(50):
            compare(*pair, seed, STEPS)


def test_an_unlinked_file_lives_while_it_is_open() -> None:
    task = Task(pages=4)
    fd = task.call("open", "/f", os.O_CREAT | os.O_RDWR, 0o600)
    assert task.call("write", fd, task.memory.put(b"x" * 16384), 16384) == 16384
    assert task.call("unlink", "/f") == 0
    assert task.ramfs.used_pages == 4
    assert task.call("lseek", fd, 0, 0) == 0
    assert task.read(fd, 3) == b"xxx"
    assert task.call("close", fd) == 0
    assert (task.ramfs.used_pages, task.ramfs.used_inodes) == (0, 1)


def test_a_full_file_system_says_so_and_loses_nothing() -> None:
    task = Task(pages=2, inodes=2)
    fd = task.call("open", "/f", os.O_CREAT | os.O_RDWR, 0o600)
    buffer = task.memory.put(b"y" * 12288)
    assert task.call("write", fd, buffer, 12288) == 8192
    assert task.call("write", fd, buffer, 1) == -errno.ENOSPC
    assert task.call("mkdir", "/d", 0o755) == -errno.ENOSPC
    assert task.call("ftruncate", fd, 1 << 40) == 0
    assert task.call("pread64", fd, buffer, 4, (1 << 40) - 4) == 4
    assert task.memory.copy_in(buffer, 4) == bytes(4)


def test_stat_has_the_layout_of_the_host(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    info = os.stat(tmp_path / "f")
    buffer = ctypes.create_string_buffer(256)
    assert LIBC.syscall(4, os.fsencode(tmp_path / "f"), buffer) == 0
    from domain.posix.sys_stat import STAT, STATFS, STATX

    assert (STAT.size, STATX.size, STATFS.size) == (144, 256, 120)
    words = STAT.unpack(buffer.raw[:144])
    assert words[0:6] == (info.st_dev, info.st_ino, info.st_nlink, info.st_mode, info.st_uid, info.st_gid)
    assert words[8] == 5 and words[13] * 10**9 + words[14] == info.st_mtime_ns
    assert LIBC.syscall(332, -100, os.fsencode(tmp_path / "f"), 0, 0xFFF, buffer) == 0
    extended = STATX.unpack(buffer.raw)
    assert extended[3:7] == (info.st_nlink, info.st_uid, info.st_gid, info.st_mode) and extended[7] == info.st_ino
    assert extended[17] * 10**9 + extended[18] == info.st_mtime_ns
    assert struct.unpack("<II", buffer.raw[136:144]) == (os.major(info.st_dev), os.minor(info.st_dev))


def test_reading_a_directory_while_it_is_emptied_skips_nothing() -> None:
    task = Task()
    for number in range(300):
        assert task.call("mkdir", f"/d{number}", 0o755) == 0
    fd = task.call("open", "/", os.O_DIRECTORY)
    buffer = task.memory.room(1000)
    names = []
    while size := task.call("getdents64", fd, buffer, 1000):
        data = task.memory.copy_in(buffer, size)
        while data:
            length = struct.unpack_from("<H", data, 16)[0]
            name = data[19:length].rstrip(b"\0").decode()
            data = data[length:]
            if name not in (".", ".."):
                names.append(name)
                assert task.call("rmdir", f"/{name}") == 0
    assert sorted(names) == sorted(f"d{number}" for number in range(300))
