"""From a file to a program: ELF64 for x86-64, its stack as the System V ABI has it, and `#!` scripts (fs/binfmt_elf.c)."""

from __future__ import annotations

import errno
import os
import stat
import struct
from array import array
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from domain.posix import registers as r
from domain.posix.errors import Errno
from domain.posix.vma import PIE_BASE, PROT_EXEC, PROT_READ, PROT_WRITE, STACK_BYTES, STACK_TOP, USER_END, USER_START, page_up
from hypervisor.public.types import PAGE_SIZE

if TYPE_CHECKING:
    from domain.posix.task import Task

EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR = struct.Struct("<IIQQQQQQ")
ET_EXEC, ET_DYN, EM_X86_64 = 2, 3, 62
PT_LOAD, PT_INTERP, PT_GNU_STACK = 1, 3, 0x6474E551
MAX_SEGMENTS, MAX_SCRIPTS, MAX_LINE = 128, 4, 256
ARGUMENT_BYTES = 1 << 20  # of arguments and environment together
(AT_PHDR, AT_PHENT, AT_PHNUM, AT_PAGESZ, AT_BASE, AT_FLAGS, AT_ENTRY) = (3, 4, 5, 6, 7, 8, 9)
(AT_UID, AT_EUID, AT_GID, AT_EGID, AT_PLATFORM, AT_HWCAP, AT_CLKTCK) = (11, 12, 13, 14, 15, 16, 17)
(AT_SECURE, AT_RANDOM, AT_HWCAP2, AT_EXECFN, AT_SYSINFO_EHDR, AT_MINSIGSTKSZ) = (23, 25, 26, 31, 33, 51)
HWCAP = 0x178B_FBFF  # cpuid 1 edx: what every x86-64 processor has
TICKS, SIGNAL_STACK = 100, 3632


@dataclass(frozen=True, slots=True)
class Segment:
    address: int
    memory: int
    offset: int
    size: int
    prot: int


@dataclass(frozen=True, slots=True)
class Elf:
    """What of a file is needed to run it, checked."""

    kind: int
    entry: int
    headers: int  # offset of the program headers
    count: int
    segments: tuple[Segment, ...]
    interpreter: bytes


def parse(inode: Any) -> Elf:
    """Raises Errno(ENOEXEC): it is none that runs here."""
    header = inode.read(0, EHDR.size)
    if len(header) < EHDR.size or header[:6] != b"\x7fELF\x02\x01":
        raise Errno(errno.ENOEXEC)
    _, kind, machine, _, entry, at, _, _, _, size, count, *_ = EHDR.unpack(header)
    if kind not in (ET_EXEC, ET_DYN) or machine != EM_X86_64 or size != PHDR.size or not 0 < count <= MAX_SEGMENTS:
        raise Errno(errno.ENOEXEC)
    table = inode.read(at, count * PHDR.size)
    if len(table) < count * PHDR.size:
        raise Errno(errno.ENOEXEC)
    segments, interpreter = [], b""
    for kind_, flags, offset, address, _, stored, memory, _ in PHDR.iter_unpack(table):
        if kind_ == PT_INTERP:
            if not 1 < stored <= 4096:
                raise Errno(errno.ENOEXEC)
            interpreter = inode.read(offset, stored).rstrip(b"\0")
        elif kind_ == PT_LOAD and memory:
            if stored > memory or (address - offset) % PAGE_SIZE or address + memory > USER_END or offset + stored > inode.size:
                raise Errno(errno.ENOEXEC)
            prot = (PROT_READ if flags & 4 else 0) | (PROT_WRITE if flags & 2 else 0) | (PROT_EXEC if flags & 1 else 0)
            segments.append(Segment(address, memory, offset, stored, prot))
    if not segments or any(a.address + a.memory > b.address for a, b in pairwise(segments)):
        raise Errno(errno.ENOEXEC)
    if kind == ET_EXEC and segments[0].address < USER_START:
        raise Errno(errno.ENOEXEC)
    return Elf(kind, entry, at, count, tuple(segments), interpreter)


def execve(task: Task, path: bytes, arguments: list[bytes], environment: list[bytes]) -> None:
    """Become another program. Raises Errno as long as the old one is intact; after that a failure kills."""
    inode, arguments, executable = _script(task, path, arguments)
    image = parse(inode)
    loader = None
    if image.interpreter:
        loader_inode = _executable(task, image.interpreter)
        loader = parse(loader_inode)
    if sum(map(len, arguments)) + sum(map(len, environment)) + 8 * len(arguments + environment) > ARGUMENT_BYTES:
        raise Errno(errno.E2BIG)
    task.system.become(task, (inode.number, False))  # the other threads end; an address space of its own, empty
    memory = task.memory
    base = PIE_BASE if image.kind == ET_DYN else 0
    end = load(memory, inode, image, base)
    vdso = page_up(end) + PAGE_SIZE  # most often by the text's own table: code of a second one costs a fork two requests more
    memory.brk_start = memory.brk_end = vdso + 3 * PAGE_SIZE
    entry = base + image.entry
    loader_base = 0
    if loader is not None:
        span = page_up(loader.segments[-1].address + loader.segments[-1].memory)
        loader_base = (memory.room(span, loader_inode) or 0) if loader.kind == ET_DYN else 0
        load(memory, loader_inode, loader, loader_base)
        entry = loader_base + loader.entry
    memory.map(STACK_TOP - STACK_BYTES, STACK_BYTES, PROT_READ | PROT_WRITE, around=8)
    memory.anticipate(STACK_TOP - STACK_BYTES, STACK_TOP)
    holders = (s for s in image.segments if s.offset <= image.headers < s.offset + s.size)
    headers = next((s.address + image.headers - s.offset for s in holders), 0)
    auxiliary = {
        AT_PHDR: base + headers, AT_PHENT: PHDR.size, AT_PHNUM: image.count, AT_BASE: loader_base, AT_ENTRY: base + image.entry,
    }  # fmt: skip
    if task.system.vdso is not None:
        auxiliary[AT_SYSINFO_EHDR] = task.system.vdso.map(memory, vdso)
    stack = _stack(task, arguments, environment, path, auxiliary)
    task.registers[0 : r.COUNT] = array("Q", r.start(entry, stack))
    task.set_fpu_state(b"")
    process = task.process
    process.executable, process.name, process.has_execed = executable, os.path.basename(path)[:15], True
    process.command_line, process.environment = (b"".join(word + b"\0" for word in part) for part in (arguments, environment))


def _executable(task: Task, path: bytes) -> Any:
    """The file, which may be executed. Raises Errno."""
    from domain.posix import vfs

    inode = vfs.existing(task, task.fs, task.fs.cwd, path)
    if not stat.S_ISREG(inode.mode) or not inode.mode & 0o111:
        raise Errno(errno.EACCES)
    return inode


def _script(task: Task, path: bytes, arguments: list[bytes]) -> tuple[Any, list[bytes], bytes]:
    """Follow `#!` lines: the program's inode, its arguments, its path without links, as /proc/PID/exe has it."""
    for _ in range(MAX_SCRIPTS + 1):
        inode = _executable(task, path)
        line = inode.read(0, MAX_LINE)
        if line[:2] != b"#!":
            return inode, arguments, _real(task, path)
        words = line[2:].split(b"\n")[0].strip().split(None, 1)
        if not words:
            raise Errno(errno.ENOEXEC)
        arguments = [*words, path, *arguments[1:]]
        path = words[0]
    raise Errno(errno.ELOOP)


def _real(task: Task, path: bytes) -> bytes:
    from domain.posix import vfs

    found = vfs.walk(task, task.fs, task.fs.cwd, path)
    if not found.name:  # it was /proc/self/exe
        return task.process.executable
    return os.path.join(vfs.path_of(task.fs, found.directory), found.name)


def load(memory: Any, inode: Any, image: Elf, base: int) -> int:
    """Its segments as areas: pages of the file, and zeroes after them. Where the last one ends."""
    end, tails = 0, []
    for segment in image.segments:
        address = base + segment.address
        start, stored = address & -PAGE_SIZE, address + segment.size
        if segment.size:
            memory.map(start, page_up(stored) - start, segment.prot, file=inode, offset=segment.offset - (address - start))
        end = address + segment.memory
        bss = page_up(stored) if segment.size else start
        if page_up(end) > bss:
            memory.map(bss, page_up(end) - bss, segment.prot)
        if segment.size and end > stored and stored % PAGE_SIZE and segment.prot & PROT_WRITE:
            tails.append((stored, page_up(stored) - stored))  # all of the page: ld.so allocates behind its end
    memory.anticipate(base + image.segments[0].address, end)
    for stored, size in tails:
        memory.copy_out(stored, bytes(size))
    return end


def _stack(task: Task, arguments: list[bytes], environment: list[bytes], path: bytes, auxiliary: dict[int, int]) -> int:
    """Strings, the auxiliary vector, pointers, argc; where rsp starts."""
    block = bytearray()
    places: list[int] = []  # from the end of the block
    for text in (path + b"\0", b"x86_64\0", os.urandom(16), *(s + b"\0" for s in arguments), *(s + b"\0" for s in environment)):
        block[:0] = text
        places.append(len(block))
    top = STACK_TOP - 16
    name, platform, random, *strings = (top - place for place in places)
    auxiliary |= {
        AT_PAGESZ: PAGE_SIZE, AT_FLAGS: 0, AT_UID: 0, AT_EUID: 0, AT_GID: 0, AT_EGID: 0, AT_PLATFORM: platform, AT_HWCAP: HWCAP,
        AT_CLKTCK: TICKS, AT_SECURE: 0, AT_RANDOM: random, AT_HWCAP2: 0, AT_EXECFN: name, AT_MINSIGSTKSZ: SIGNAL_STACK,
    }  # fmt: skip
    count = len(arguments)
    words = [count, *strings[:count], 0, *strings[count:], 0]
    for key, value in auxiliary.items():
        words += [key, value]
    words += [0, 0]
    stack = top - len(block) - 8 * len(words) & -16
    task.memory.copy_out(top - len(block), block)
    task.memory.copy_out(stack, struct.pack(f"<{len(words)}Q", *words))
    return stack
