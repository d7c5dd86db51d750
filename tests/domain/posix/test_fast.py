"""Patched call sites and calls served in a program's own process: nobody can tell, and nobody but the program can be hurt."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from weakref import ref

import pytest

from dom0 import ramdisk
from domain._guest import ffi, lib
from domain.posix import low, memory, sites, traps, windows
from domain.posix import registers as r
from domain.posix import space as kinds
from domain.posix.files import FileTable, RegularFile
from domain.posix.frames import Frames, PageCache
from domain.posix.ramfs import RamFile, Ramfs
from domain.posix.sites import CODE, END, THUNKS, Site, recognized
from domain.posix.vma import FILES, NEAR_END
from hypervisor.public.user import USER_CALL
from tests.conftest import NIGHTLY
from tests.domain.posix import programs, traced
from tests.models import mutant

SOURCE = Path(__file__).with_name("fast.c")
FAR = (1 << 64) - 1

SAME = ("ids", "files", "old", "text", "restart", "threads", "tables", "steps", "moved")
pytestmark = [
    pytest.mark.skipif(not os.path.exists(programs.BUSYBOX), reason="needs busybox-static as /bin/busybox"),
    pytest.mark.timeout(60),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    (root / "bin").mkdir()
    command = ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", str(SOURCE), "-o"]
    subprocess.run([*command, str(root / "bin/fast")], check=True)
    return root


@pytest.fixture(scope="module")
def disk(folder: Path) -> bytes:
    return programs.archive(folder)


def said(result: programs.Result) -> tuple[str, int]:
    return result.output.decode().replace("\r\n", "\n"), result.status


# ---- the same to every program


def native(program: Path, what: str, folder: Path) -> str:
    """What it says on the host. There nobody knows when a read has begun: that one is not asked."""
    if what == "restart":
        return "restart\n"
    return subprocess.run([program, what], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("what", SAME)
def test_a_program_cannot_tell(what: str, folder: Path, disk: bytes, tmp_path: Path) -> None:
    expected = native(folder / "bin/fast", what, tmp_path)
    slow, fast = programs.run(["/bin/fast", what], disk), programs.run(["/bin/fast", what], disk, fast=True)
    assert said(slow) == said(fast) == (expected, 0)
    assert fast.system.counters["syscalls"] < 0.95 * slow.system.counters["syscalls"], "most were served in the program"


@pytest.mark.parametrize(
    "script",
    [
        "for i in 1 2 3; do echo $i | cat | tr 1-3 a-c; done; x=$(seq 30 | sort -rn | head -3); echo $x",
        "(exit 3); echo $?; trap 'echo caught' USR1; kill -USR1 $$; sh -c 'kill -TERM $$'; echo $?",
        "seq 900 >/tmp/f; while read a; do read b; done </tmp/f; echo $a $b; tail -3 /tmp/f; md5sum /tmp/f /bin/busybox",
        "tar cf - -C /bin fast | gzip -1 | gunzip | tar xOf - | md5sum; cp /bin/fast /f; /f ids; cmp /f /bin/fast; md5sum </f",
    ],
)
def test_the_shell_cannot_tell(script: str, disk: bytes) -> None:
    """Many processes of one binary, one after another and side by side."""
    slow, fast = (programs.run(["/bin/sh", "-c", script], disk, fast=fast) for fast in (False, True))
    assert said(slow) == said(fast)
    assert fast.system.sites._made, "something was patched"


@pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="needs bash")
def test_libraries_are_within_reach() -> None:
    """So that their read, too, is patched, and a file that is read byte by byte is lent."""
    out = io.BytesIO()
    ramdisk.build(out, None, Path(programs.BUSYBOX), programs=[Path("/bin/bash")])
    script = "for ((i = 0; i < 200; i++)); do echo $i; done >/tmp/f; while read x; do ((s += x)); done </tmp/f; echo $s"
    slow, fast = (programs.run(["/bin/bash", "-c", script], out.getvalue(), fast=fast) for fast in (False, True))
    assert said(slow) == said(fast) == ("19900\n", 0)
    near = [site for site in fast.system.sites._made.values() if site.near]
    assert near and all(site.address < NEAR_END for site in near)


def test_nothing_is_left_of_programs_that_ended(disk: bytes) -> None:
    """What all programs share is kept, and what is patched of a file as long as there is memory."""
    result = programs.run(["/bin/sh", "-c", "fast files; fast tables; (sleep 0 | cat); fast files"], disk, fast=True)
    system = result.system
    while system.frames.shrink():
        pass
    assert system.frames.used == len(system.sites.shared)
    assert all(inode.lent is None for inode in _files(system.root))


def _files(directory: Any) -> list[Any]:
    found = []
    for _, inode in directory.entries.values():
        found += _files(inode) if hasattr(inode, "entries") else [inode] if hasattr(inode, "lent") else []
    return found


# ---- a call that is stopped at each of its instructions


class Stepped(traced.Traced):
    """Makes a signal of every instruction of a call in the area: the first time the first, the next time the second, and so on.
    A getsid says that the call comes next."""

    armed, at, stops = False, 0, 0
    stop: Callable[[], None]

    def run(self, timeout_ns: int) -> int:
        if self.armed:
            self.armed = False
            if (kind := self._step()) >= 0:
                return kind
        kind = super().run(-1)
        if kind == kinds.SYSCALL and self.number == 124:
            self.armed = True
        return kind

    def _step(self) -> int:
        """TIMEOUT at the instruction in question; what else comes first; -1: it was not to be found."""
        inside = 0
        for _ in range(300):
            self.words[r.ORIG_RAX] = FAR
            status = self._resume(traced.STEP)
            if os.WSTOPSIG(status) != signal.SIGTRAP or self.words[r.RIP] == USER_CALL + 1:
                return self._why(status)
            if CODE <= self.words[r.RIP] < END:
                inside += 1
                if inside > self.at:
                    self.at += 1
                    type(self).stops += 1
                    self.stop()
                    return kinds.TIMEOUT
        return -1


def check_steps(disk: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler comes at each instruction, and makes calls of its own."""

    class Signalled(Stepped):
        def stop(self) -> None:
            assert self.task is not None
            self.task.process.send_signal(int(signal.SIGUSR1))

    monkeypatch.setattr(programs, "Traced", Signalled)
    result = programs.run(["/bin/fast", "steps"], disk, fast=True)
    assert said(result) == ("steps\n", 0)
    assert 60 < Signalled.stops < 120, "every instruction, and the last round had none left"


def test_a_call_can_be_interrupted_at_every_instruction(disk: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    check_steps(disk, monkeypatch)


def _forgetful(self: low.Low, registers: Any) -> bool:
    return False


def _always_back(self: low.Low, registers: Any) -> bool:
    """As `place`, but a call that has happened is made once more."""
    image = self.sites.image
    if image.committed <= registers[r.RIP] - CODE < image.end:
        registers[r.RIP] = CODE + image.saved
    return PLACE(self, registers)


PLACE = low.Low.place


@pytest.mark.parametrize("defect", [_forgetful, _always_back])
def test_without_its_care_a_call_goes_wrong(defect: Any, disk: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low.Low, "place", defect)
    with pytest.raises(AssertionError):
        check_steps(disk, monkeypatch)


class Threads(Stepped):
    """At every stop another thread of the same memory runs."""

    def run(self, timeout_ns: int) -> int:
        self.armed = True
        return super().run(timeout_ns) if self.at < 150 else traced.Traced.run(self, timeout_ns)

    def stop(self) -> None:
        pass


def check_threads(disk: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "Traced", Threads)
    result = programs.run(["/bin/fast", "threads"], disk, fast=True)
    assert said(result) == ("threads\n", 0)


def test_threads_share_one_area(disk: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    check_threads(disk, monkeypatch)
    assert Threads.stops > 80


# ---- programs that attack


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("table", 139), ("code", 139), ("readonly", 139), ("other", 139), ("window", 0), ("mmap", 0), ("unmap", 0),
        ("position", 0), ("data", None), ("loop", 0), (f"jump {1 if NIGHTLY else 13}", 0),
    ],
)  # fmt: skip
def test_a_program_hurts_itself_alone(how: str, status: int | None, disk: bytes) -> None:
    """None: it may live or die."""
    script = f"fast {how} >/dev/null 2>&1; s=$?; fast files; fast ids; echo $s"
    result = programs.run(["/bin/sh", "-c", script], disk, fast=True, seconds=40)
    *after, last = said(result)[0].split()
    assert after == ["files", "ids"]
    assert status in (None, int(last)), last


# ---- what is recognized


MOV = b"\xb8\x27\0\0\0\x0f\x05"
XOR = b"\x31\xc0\x0f\x05\x48\x3d\0\xf0\xff\xff"


@pytest.mark.parametrize(
    ("code", "back", "number", "found"),
    [
        (b"\xc3" + MOV, 8, 39, MOV),
        (b"\xc3" + MOV, 8, 40, b""),  # it came with another number
        (b"\x41" + MOV, 8, 39, b""),  # mov $39,%r8d
        (b"\x48" + MOV, 8, 39, b""),
        (b"\x66" + MOV, 8, 39, b""),
        (MOV, 7, 39, b""),  # what is before it is in another page
        (b"\xc3\xb8\x27\0\0\0\x0f\x34", 8, 39, b""),  # sysenter
        (bytes(8) + b"\xc3" + XOR, 13, 0, XOR),
        (bytes(8) + b"\xc3" + XOR, 13, 1, b""),
        (bytes(8) + b"\x45" + XOR, 13, 0, b""),  # xor %r8d,%r8d
        (bytes(8) + b"\xc3" + XOR[:4] + b"\x48\x83" + XOR[6:], 13, 0, b""),
        (bytes(4096 - 9) + XOR[:9], 4096 - 5, 0, b""),  # not all of it in this page
        (b"\x0f\x05", 2, 39, b""),
        (bytes(4094) + b"\x0f\x05", 4096, 39, b""),
    ],
)
def test_what_is_a_call_site(code: bytes, back: int, number: int, found: bytes) -> None:
    assert recognized(code.ljust(4096, b"\0"), back, number) == found


@pytest.mark.parametrize("address", [0x10_0000, 0x40_1741, 0x40_17FF, 0x123_4567, 0x1F0_0001])
def test_a_second_form_leaves_no_instruction_in_its_middle(address: int) -> None:
    """Of all places for a thunk some are good from each site; there, neither of the two old instructions is one."""
    good = [at for at in range(THUNKS, END, 32) if sites.reaches(address, at)]
    assert len(good) > 100
    for thunk in good:
        code = sites.jump(Site(address, XOR, thunk)) + XOR[5:]
        assert code[0] == 0xE9 and code[2] in sites.INVALID and code[4] in (0xFE, 0xFF) and code[5] == 0x3D
        assert struct.unpack_from("<i", code, 1)[0] + address + 5 == thunk


def test_out_of_reach_there_is_no_second_form() -> None:
    assert not any(sites.reaches(0x5555_5555_0000, at) for at in range(THUNKS, END, 32))


# ---- the C, over memory of the test's


READ, WRITE, LSEEK, PREAD, PWRITE = 0, 1, 8, 17, 18
SLOW = -4096
CALLS = [  # number, descriptor, count, offset; result, position
    ((READ, 3, 100, 0), 100, 110), ((READ, 3, 5000, 0), 4990, 5000), ((READ, 3, 0, 0), 0, 10), ((READ, 5, 1, 0), SLOW, None),
    ((READ, 3, 65537, 0), SLOW, None), ((READ, 3, FAR, 0), SLOW, None), ((READ, 6, 1, 0), SLOW, None),
    ((READ, 64, 1, 0), SLOW, None), ((READ, FAR, 1, 0), SLOW, None), ((PREAD, 3, 1, 5000), 0, 10),
    ((PREAD, 3, 1, 5001), SLOW, None), ((PREAD, 3, 65536, 1), 4999, 10), ((PREAD, 3, 1, FAR), SLOW, None),
    ((WRITE, 3, 100, 0), 100, 110), ((WRITE, 3, 4990, 0), 4990, 5000), ((WRITE, 3, 4991, 0), SLOW, None),
    ((WRITE, 4, 1, 0), SLOW, None), ((PWRITE, 5, 1, 4999), 1, 10), ((PWRITE, 5, 1, 5000), SLOW, None),
    ((PWRITE, 3, 0, 0), 0, 10), ((PWRITE, 3, 2, FAR), SLOW, None),
]  # fmt: skip


class Lent:
    """Windows, their files, a buffer. Descriptor 3 has 5000 bytes at position 10; 4 may only be read, 5 only written."""

    def __init__(self, call: Callable[..., int] = lib.fast_try) -> None:
        self.call = call
        self.table, self.files, self.buffer = ffi.new("char[]", 65 * 32), ffi.new("char[]", 6 << 20), ffi.new("char[]", 70_000)
        for fd, access in ((3, 3), (4, 1), (5, 2)):
            struct.pack_into("<QQII", ffi.buffer(self.table), 32 * fd, 5000, 10, access, 0)
            ffi.memmove(self.files + (fd << 20), bytes(i * 7 & 255 for i in range(5000)), 5000)

    def try_(self, number: int, fd: int, address: Any, count: int, offset: int) -> tuple[int, int]:
        """The result, and the position that comes with it."""
        now = ffi.new("uint64_t *")
        result = self.call(self.table, self.files, number, fd, address, count, offset, now)
        return result, now[0]


def check_calls(call: Callable[..., int]) -> None:
    for (number, fd, count, offset), result, position in CALLS:
        lent = Lent(call)
        before = bytes(ffi.buffer(lent.files, 6 << 20))
        got, now = lent.try_(number, fd, lent.buffer, count, offset)
        assert got == result and position in (None, now), (number, fd, count, offset)
        place = (10 if number in (READ, WRITE) else offset) + (fd << 20)
        expected = bytearray(before)
        if result > 0 and number in (READ, PREAD):
            assert bytes(ffi.buffer(lent.buffer, result)) == before[place : place + result]
        elif result > 0:
            expected[place : place + result] = bytes(result)
        assert bytes(ffi.buffer(lent.files, 6 << 20)) == expected
        dirty = struct.unpack_from("<I", ffi.buffer(lent.table), 32 * (fd & 7) + 20)[0]
        assert dirty == (result > 0 and number in (WRITE, PWRITE))


def test_the_code_does_what_is_plainly_within_the_file() -> None:
    check_calls(lib.fast_try)


@pytest.mark.parametrize(
    "change",
    [
        (" || count > FAST_MOST", " || (int64_t)count < 0"),
        ("place > w.size || ", ""),
        (" || count > w.size - place)", " || count > w.size)"),
        ("!(w.access & FAST_WRITE) ||", ""),
        ("if (!(w.access & FAST_READ))", "if (!w.access)"),
        ("|= count > 0", "= 1"),
        ("? place + count : w.position", "? place + count : place"),
    ],
)
def test_code_with_a_hole_is_found(change: tuple[str, str], tmp_path: Path) -> None:
    source = "domain/posix/fast.c"
    other, code = mutant.library(tmp_path / "fast.so", "domain/posix/fast.h", [source], {source: [change]})

    def call(*words: Any) -> int:
        addresses = (word if isinstance(word, int) else int(ffi.cast("uintptr_t", word)) for word in words)
        return code.fast_try(*(other.cast("void *", a) if i in (0, 1, 4, 7) else a for i, a in enumerate(addresses)))

    with pytest.raises(AssertionError):
        check_calls(call)


@pytest.mark.parametrize(
    ("offset", "whence", "result"),
    [
        (5, 0, 5), (-1, 0, SLOW), (-10, 1, 0), (-11, 1, SLOW), (0, 2, 5000), (-5001, 2, SLOW), (1 << 62, 0, 1 << 62),
        (0, 3, SLOW), ((1 << 63) - 11, 1, (1 << 63) - 1), ((1 << 63) - 10, 1, SLOW), (0, -1, SLOW),
    ],
)  # fmt: skip
def test_the_code_seeks_as_lseek_does(offset: int, whence: int, result: int) -> None:
    got, now = Lent().try_(LSEEK, 3, ffi.cast("void *", offset & FAR), whence & FAR, 0)
    assert got == result
    assert result in (SLOW, now)


def test_the_code_is_free_of_everything(tmp_path: Path) -> None:
    """No relocation, no segment, no vector register: it is copied as it is, and preserves what it does not save."""
    image, code = ffi.new("struct fast_image *"), bytearray(4096)
    lib.fast_image(image, ffi.from_buffer(code), 4096)
    (tmp_path / "code").write_bytes(code[: image.bytes])
    command = ["objdump", "-D", "-b", "binary", "-m", "i386:x86-64", str(tmp_path / "code")]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for word in ("%fs", "%gs", "xmm", "ymm", "syscall", "(bad)", "(%rip)"):
        assert word not in listing, word
    assert 0 == image.enter < image.saved < image.committed < image.end < image.bytes


# ---- memory that is short


class Table:
    """Of a program that is not there."""

    task = None

    def map(self, page: int, pfn: int, write: bool, execute: bool) -> None: ...
    def unmap(self, page: int) -> None: ...
    def flush(self) -> None: ...


def test_lent_files_come_back_when_memory_is_short() -> None:
    """All but the one that is being lent, which is smaller for it; no byte is lost, and no frame."""
    machine = traced.Machine(64 + 44)
    frames = Frames(machine, machine.base)
    area = sites.Sites(frames, PageCache(frames))
    ramfs, task = Ramfs(lambda: 0), SimpleNamespace(files=FileTable(), system=SimpleNamespace(tasks={}))
    task.memory = SimpleNamespace(low=low.Low(area, Table()))
    kept = frames.used
    for fd in range(3):
        inode = ramfs.create(0o100600)
        assert isinstance(inode, RamFile)
        inode.write(0, bytes([fd + 1]) * 65536)
        task.files.install(RegularFile(inode, os.O_RDWR))
        for _ in range(3):
            windows.lend(cast(Any, task), fd)
        assert task.memory.low.fault(FILES + (fd << 20)) and inode.lent
    lent = [file.inode.lent is not None for file in task.files.open.values()]
    assert lent == [False, False, True]
    for fd, file in task.files.open.items():
        assert file.inode.read(0, 70_000) == bytes([fd + 1]) * 65536
    task.files.release()
    assert frames.used > kept and not area.lent
    frames.in_force()
    while frames.shrink():
        pass
    assert frames.used == kept


# ---- with a hole


def _in_place(self: sites.Sites, inode: Any, index: int, page: int, pfn: int) -> sites.Text:
    self.frames.hold(pfn)
    text = self._texts.setdefault(ref(inode, self._forget), (inode.generation, {}))[1][index, page] = sites.Text(pfn)
    return text


DEFECTS: dict[str, tuple[str, tuple[Any, str, Any]]] = {
    "a length changes under a window": ("files", (windows.Lent, "recall", lambda self: None)),
    "a window outlives its descriptor": ("files", (windows.Window, "close", lambda self: None)),
    "one table's windows are another's": ("tables", (low.Low, "take_back", lambda self: None)),
    "a thread has another's number": ("threads", (low.Low, "shown", lambda self, task: None)),
    "a copy of text keeps patches": ("text", (sites.Sites, "restore", lambda self, page, pfn: None)),
    "a jump to an old instruction is none": ("old", (traps, "_patched", lambda system, task: False)),
    "a patch is made in the file's page": ("text", (sites.Sites, "_copy", _in_place)),
    "moved text is not looked at": ("moved", (memory.Memory, "_unpatch", lambda self, page: None)),
    "an append-only file is written anywhere": ("files", (windows.os, "O_APPEND", 0)),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_without_its_check_a_program_can_tell(defect: str, disk: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    what, (owner, name, hole) = DEFECTS[defect]
    monkeypatch.setattr(owner, name, hole)
    try:
        result = programs.run(["/bin/fast", what], disk, fast=True)
    except (KeyError, ValueError):  # a defect that the kernel itself trips over
        return
    assert result.status, result.output
