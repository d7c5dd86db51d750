"""The builder: from a kernel's file to a paused domain whose frames hold it. Runs in dom0, through foreign mappings.

    CreateDomain, ports for store and console, start_info, the two reserved grants, the kernel's own frames, page tables,
    PIN_L3, LaunchInfo

What it maps of the domain it unmaps before the first unpause; from then on dom0 has the store's and the console's page,
which the domain granted to it in entries 0 and 1 of its table, and nothing else.
"""

from __future__ import annotations

import array
import os
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dom0 import elf
from domain import memory
from domain._guest import ffi, lib
from domain.grant import GrantError, Mapping
from hypervisor.public.boot_tables import BootTables, boot_tables
from hypervisor.public.domctl import (
    CreateDomain,
    CreateFlags,
    DestroyDomain,
    GetMemList,
    LaunchInfo,
    MapForeign,
    SetMaxMem,
    UnmapForeign,
)
from hypervisor.public.errors import Exists, NoMemory, NoSpace, XenError
from hypervisor.public.grant import GREF_CONSOLE, GREF_XENSTORE, Gtf
from hypervisor.public.layout import (
    CONSOLE_PFN,
    FD_DESCRIPTORS,
    FD_REPLY,
    FD_REQUEST,
    FD_UPCALL,
    GRANT_ENTRIES,
    GRANT_PFN,
    KERNEL_PFN,
    KERNEL_WINDOW,
    SHARED_INFO,
    START_INFO_PFN,
    STORE_PFN,
    VIRT_BASE,
    virt,
)
from hypervisor.public.mmu import EXT_OP, MmuextCommand, MmuextOp
from hypervisor.public.start_info import StartInfo
from hypervisor.public.types import MAX_BATCH, PAGE_SIZE

if TYPE_CHECKING:
    from domain.kernel import Kernel

DOM0 = 0
CHUNK = 64  # frames mapped at a time: one monitor batch at worst
REFUSALS: dict[type[XenError], str] = {
    Exists: "there is a domain of that name",
    NoMemory: "the machine has not that much memory free",
    NoSpace: "its process could not be started; `ring1 dmesg` says why",
}
ARCHIVE = b"070701"  # a cpio archive: the ramdisk of the POSIX kernel, domain/posix
MAX_SOURCE, MAX_IMAGE = 4 << 20, 64 << 20  # bytes of a file


class BuildError(Exception):
    """The domain cannot be built: one sentence; nothing of it is left."""


@dataclass(frozen=True)
class Image:
    """A kernel as it is loaded: source for the guest library, a ramdisk for its POSIX kernel, an ELF file, or the name of a
    driver domain's module."""

    source: bytes = b""
    native: elf.Elf | None = None
    entry: str = ""


@dataclass(frozen=True)
class Built:
    """A paused domain and dom0's ends of it."""

    domid: int
    store_port: int
    console_port: int
    pages: Mapping  # console, store


def read_image(path: Path) -> Image:
    """Raises BuildError."""
    data = _read(path)
    if data.startswith(b"\x7fELF"):
        try:
            return Image(native=elf.parse(data))
        except elf.ElfError as error:
            raise BuildError(f"kernel {path}: {error}") from None
    if data.startswith(ARCHIVE):
        return Image(source=data)
    if len(data) > MAX_SOURCE:
        raise BuildError(f"kernel {path}: {len(data)} bytes of source, at most {MAX_SOURCE}")
    try:
        compile(data, str(path), "exec", dont_inherit=True)  # the first place that can say where it is wrong
    except (SyntaxError, ValueError) as error:
        raise BuildError(f"kernel {path}: {error}") from None
    return Image(source=data)


def _read(path: Path) -> bytes:
    """A regular file, of a size that dom0 can hold: a FIFO or a device would keep it reading for ever."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise BuildError(f"kernel {path}: {getattr(error, 'strerror', None) or error}") from None
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise BuildError(f"kernel {path}: not a regular file")
        data = file.read(MAX_IMAGE + 1)
    if len(data) > MAX_IMAGE:
        raise BuildError(f"kernel {path}: more than {MAX_IMAGE >> 20} MiB")
    return data


def build(
    kernel: Kernel, name: str, image: Image, frames: int, cmdline: str = "", flags: CreateFlags = CreateFlags.NONE,
    descriptor: int = -1, max_frames: int = 0,
) -> Built:  # fmt: skip
    """A domain `name` of `frames` frames, which may grow to `max_frames`, paused. `descriptor` goes to FD_DESCRIPTORS of a
    driver domain.

    Raises BuildError.
    """
    end = image.native.end_pfn if image.native else KERNEL_PFN + -(-len(image.source) // PAGE_SIZE)
    tables = boot_tables(end, max(frames, max_frames))
    if tables.tables.stop + 1 >= frames:
        end = tables.tables.stop
        raise BuildError(f"{frames * PAGE_SIZE >> 10} KiB is too little: image and page tables end at frame {end}")
    if descriptor >= 0:
        with socket.socket(fileno=kernel.start.descriptors_fd) as sock:
            socket.send_fds(sock, [b"fd"], [descriptor])
            sock.detach()
    flags |= CreateFlags.NATIVE if image.native else CreateFlags.NONE
    try:
        domid = kernel.call(CreateDomain(name, frames, int(flags), int(descriptor >= 0), image.entry))
    except XenError as error:
        raise BuildError(f"{name}: {REFUSALS.get(type(error), f'the hypervisor refused to create it: {error}')}") from None
    try:
        if max_frames > frames:
            kernel.call(SetMaxMem(domid, max_frames))
        return _fill(kernel, domid, name, image, frames, tables, cmdline, descriptor >= 0)
    except (XenError, GrantError) as error:
        kernel.call(DestroyDomain(domid))
        raise BuildError(f"{name}: it ended while it was built: {error}") from None


def _fill(
    kernel: Kernel, domid: int, name: str, image: Image, frames: int, tables: BootTables, cmdline: str, fds: bool
) -> Built:
    evtchn = kernel.evtchn
    ports = [evtchn.alloc_unbound(DOM0, domid) for _ in range(2)]
    info = StartInfo(
        frames, 0, STORE_PFN, ports[0], CONSOLE_PFN, ports[1], 0, 0, cmdline, domid, name, VIRT_BASE, KERNEL_WINDOW,
        SHARED_INFO, FD_REQUEST, FD_REPLY, FD_UPCALL, FD_DESCRIPTORS if fds else -1, kernel.start.boot_ns, virt(GRANT_PFN),
        GRANT_ENTRIES, image.entry, virt(tables.tables.start), len(tables.tables), virt(tables.mfn_list.start),
        tables.max_pages,
    )  # fmt: skip
    text, entry = range(0), 0
    pieces = list[tuple[int, bytes]]()
    if image.source:
        info = replace(info, mod_start=virt(KERNEL_PFN), mod_len=len(image.source))
        pieces.append((KERNEL_PFN, image.source))
    if image.native:
        pieces += [(segment.pfn, bytes(segment.offset) + segment.data) for segment in image.native.segments]
        text = range(image.native.text.pfn, image.native.text.pfn + image.native.text.pages)
        entry = image.native.entry
    mfns = _frames_of(kernel, domid, frames)
    pieces += [
        (START_INFO_PFN, info.pack()), (GRANT_PFN, _grants_to_dom0(mfns)), (tables.mfn_list.start, tables.pack(mfns, text)),
    ]  # fmt: skip
    _write(kernel, domid, pieces)
    _start_with(kernel, domid, mfns[tables.tables.start], entry)
    return _connect(kernel, domid, ports)


def _frames_of(kernel: Kernel, domid: int, count: int) -> array.array[int]:
    """The mfns of a domain being built, by pfn."""
    mfns = array.array("Q")
    scratch = kernel.memory.alloc(1)
    try:
        while len(mfns) < count:
            got = kernel.call(GetMemList(domid, len(mfns), min(MAX_BATCH, count - len(mfns)), scratch.va))
            mfns.frombytes(memory.read(scratch.address, 8 * got))
    finally:
        kernel.memory.free(scratch)
    return mfns


def _start_with(kernel: Kernel, domid: int, root: int, entry: int) -> None:
    """Its page tables are validated and pinned by the hypervisor, which then maps what they say."""
    scratch = kernel.memory.alloc(1)
    try:
        memory.write(scratch.address, EXT_OP.pack(MmuextCommand.PIN_L3, root, 0))
        kernel.call(MmuextOp(scratch.va, 1, 0, domid))
    finally:
        kernel.memory.free(scratch)
    kernel.call(LaunchInfo(domid, root, entry))


def _connect(kernel: Kernel, domid: int, ports: list[int]) -> Built:
    """dom0's ends of store and console; none of them where the domain died before the last. Raises XenError, GrantError."""
    pages = kernel.grants.map(domid, [GREF_CONSOLE, GREF_XENSTORE])
    ours: list[int] = []
    try:
        for port in ports:
            ours.append(kernel.evtchn.bind_interdomain(domid, port))
    except XenError:
        for port in ours:
            kernel.evtchn.close(port)
        kernel.grants.unmap(pages)
        raise
    return Built(domid, ours[0], ours[1], pages)


def _write(kernel: Kernel, domid: int, pieces: Sequence[tuple[int, bytes]]) -> None:
    """Copy each piece to the domain's frames from its pfn on, CHUNK frames mapped at a time. Raises XenError."""
    size = CHUNK * PAGE_SIZE
    end = max(pfn * PAGE_SIZE + len(data) for pfn, data in pieces)
    for base in range(0, end, size):
        parts = []
        for pfn, data in pieces:
            skip = base - pfn * PAGE_SIZE
            part = data[max(0, skip) : max(0, skip + size)]
            if part:
                parts.append((max(0, -skip), part))
        if parts:
            first = min(at for at, _ in parts) // PAGE_SIZE
            count = -(-max(at + len(part) for at, part in parts) // PAGE_SIZE) - first
            parts = [(at - first * PAGE_SIZE, part) for at, part in parts]
            _write_chunk(kernel, domid, base // PAGE_SIZE + first, count, parts)


def _write_chunk(kernel: Kernel, domid: int, pfn: int, count: int, writes: Sequence[tuple[int, bytes]]) -> None:
    va = kernel.grants.reserve(count)
    try:
        kernel.call(MapForeign(domid, pfn, count, va))
        try:
            for offset, data in writes:
                memory.write(KERNEL_WINDOW + va + offset, data)
        finally:
            kernel.call(UnmapForeign(va, count))
    finally:
        kernel.grants.unreserve(va, count)


def _grants_to_dom0(mfns: Sequence[int]) -> bytes:
    """Entries 0 and 1 of its table: the console's and the store's page, for dom0 (xen/include/public/grant_table.h)."""
    table = ffi.new("char[]", 16)
    lib.grant_set(table, GREF_CONSOLE, int(Gtf.PERMIT_ACCESS), DOM0, mfns[CONSOLE_PFN])
    lib.grant_set(table, GREF_XENSTORE, int(Gtf.PERMIT_ACCESS), DOM0, mfns[STORE_PFN])
    return bytes(ffi.buffer(table))
