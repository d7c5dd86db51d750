"""Call sites: programs' own `syscall` instructions, replaced in memory by jumps that need no trap of the host's.

A site is patched when it has trapped, which proves that its bytes are that instruction, and if the bytes before load the number
it trapped with. It becomes a jump to its *thunk*, in frames that every program has read-execute: the thunk does what the bytes
did, and goes to the fast path of that call (fast.c), or to the gate.

    b8 nr nr nr nr 0f 05      mov $nr,%eax; syscall      ff 24 25 xx xx 06 00    jmp *slot
    31 c0 0f 05 48 3d ....    xor %eax,%eax; syscall;    e9 xx 06 xx ff 3d ....  jmp thunk, whose tail does the cmp
                              cmp $imm,%rax

Either way the old `syscall` begins with a byte that begins no instruction: who jumps to it is served when that exception comes.
The second form is how `read` is called. A 32-bit jump reaches thunks from text below NEAR_END, where memory.py puts libraries;
and such a thunk has to lie where the middle byte of the distance comes out so.

Patched text is a copy of the file's page, shared by all that run the file at these addresses. The file is never changed, and a
page that a program writes to becomes a copy without patches.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

from domain import memory
from domain._guest import ffi, lib
from domain.posix.errors import Errno
from domain.posix.frames import Frames, PageCache
from domain.posix.vma import PROT_EXEC, PROT_WRITE, USER_START, Vma
from hypervisor.public.types import PAGE_SHIFT, PAGE_SIZE
from hypervisor.public.user import USER_CALL

TABLE, DATA, CODE, END = 0x6_0000, 0x7_0000, 0x8_0000, USER_START  # fast.h
SLOTS = (DATA - TABLE) // 8
THUNK, THUNKS = 32, CODE + PAGE_SIZE
NR_THUNKS = (END - THUNKS) // THUNK
TAIL, CMP = 16, 6  # of the second form's thunk: where its call returns to, and the instruction there
# What makes, replaces, restores or ends a program, or waits for that, needs all registers: it may as well come with them.
NEVER = frozenset((15, 56, 57, 58, 59, 60, 61, 231, 247, 322, 435))
READ, WRITE, LSEEK, PREAD, PWRITE = 0, 1, 8, 17, 18
FILE_CALLS = frozenset((READ, WRITE, LSEEK, PREAD, PWRITE))
WORDS = {39: 0, 186: 4, 110: 8, 102: 12, 107: 16, 104: 20, 108: 24}  # number: where struct fast_data has the answer
INVALID = frozenset((0x06, 0x07, 0x0E, 0x16, 0x17, 0x1E, 0x1F, 0x27, 0x2F, 0x37, 0x3F, 0x60, 0x61))  # in 64-bit code
LONGER = frozenset((0x66, *range(0x40, 0x50)))  # prefixes that make another instruction of what follows
REFUSED = 4096  # remembered, so that they are not looked at again


@dataclass(frozen=True, slots=True)
class Site:
    """`code`: the bytes that it had, 7 or 10."""

    address: int
    code: bytes
    thunk: int
    slot: int = 0

    @property
    def near(self) -> bool:
        """The second form: reached and left by 32-bit jumps."""
        return not self.slot

    @property
    def number(self) -> int:
        return 0 if self.near else int.from_bytes(self.code[1:5], "little")

    @property
    def syscall(self) -> int:
        """Where the instruction was, and an invalid one is now."""
        return self.address + (2 if self.near else 5)

    @property
    def back(self) -> int:
        """Where its call returns to."""
        return self.thunk + TAIL if self.near else self.address + 7

    @property
    def behind(self) -> int:
        """Behind that instruction, where the second form has an invalid one, too: its thunk does what was there."""
        return self.syscall + 2

    def own(self, rip: int) -> int:
        """An address in the thunk as the program's own code has it: before the call, or behind it."""
        if not self.near or rip - self.thunk < TAIL:
            return self.address
        return self.address + (4 if rip - self.thunk < TAIL + CMP else 10)


@dataclass(slots=True)
class Text:
    """A patched copy of a page of a file, for one address."""

    pfn: int
    sites: list[Site] = field(default_factory=list)


class Sites:
    """Those of a domain, and the frames of the area that all programs share; these are taken as it grows, and kept."""

    def __init__(self, frames: Frames, cache: PageCache) -> None:
        self.frames, self.cache = frames, cache
        self._texts: dict[ref[Any], tuple[int, dict[tuple[int, int], Text]]] = {}  # inode: generation, (index, page): copy
        self._made: dict[tuple[int, bytes], Site] = {}  # by address and code: one thunk, whatever file it is in
        self._thunks: dict[int, Site] = {}  # by number
        self._pages: dict[int, list[Site]] = {}  # by page, of whatever file
        self._next, self._slots = 0, 1
        self._refused: set[tuple[int, int]] = set()
        self.shared: dict[int, int] = {}  # page of the area: frame
        self.spaces: Callable[[], Iterable[Any]] = tuple  # every program's memory
        self.lent: list[Any] = []  # files that programs have: windows.py
        shrink = frames.shrink
        frames.shrink = lambda: shrink() or self.shrink()
        self.image = ffi.new("struct fast_image *")
        code = bytearray(PAGE_SIZE)
        lib.fast_image(self.image, ffi.from_buffer(code), PAGE_SIZE)
        assert self.image.bytes <= PAGE_SIZE, f"the fast path has {self.image.bytes} bytes"
        self._put(CODE, bytes(code))
        self._put(TABLE, USER_CALL.to_bytes(8, "little"))

    def _put(self, address: int, data: bytes) -> None:
        """Into the shared part of the area, all of it in one page. Raises Errno(ENOMEM)."""
        page = address >> PAGE_SHIFT
        if page not in self.shared:
            self.shared[page] = self.frames.alloc()
        memory.write(self.frames.address(self.shared[page]) + address % PAGE_SIZE, data)

    # ---- from a trap to a patch

    def prove(self, space: Any, back: int, number: int) -> None:
        """In a program's memory, the instruction before `back` has trapped as system call `number`: patch it if that can be."""
        page = back - 1 >> PAGE_SHIFT
        key = space.pages.get(page, 0) >> 2, back
        if key in self._refused:
            return
        try:
            done = number not in NEVER and self._patch(space, page, back, number)
        except Errno:  # no memory for it
            done = False
        if not done:
            if len(self._refused) >= REFUSED:
                self._refused.clear()
            self._refused.add(key)

    def _patch(self, space: Any, page: int, back: int, number: int) -> bool:
        vma = space.areas.find(back - 1)
        if vma is None or not patchable(vma) or page not in space.pages:
            return False
        pfn, index = space.pages[page] >> 2, index_of(vma, page)
        text = self.text(vma.file, index, page)
        if pfn not in (text.pfn if text else None, self.cache.cached(vma.file).get(index)):
            return False
        code = recognized(memory.read(self.frames.address(pfn), PAGE_SIZE), back - (page << PAGE_SHIFT), number)
        site = self._site(back - (4 if len(code) == 10 else 7), code) if code else None
        if site is None:
            return False
        text = text or self._copy(vma.file, index, page, pfn)
        if site not in text.sites:
            text.sites.append(site)
            memory.write(self.frames.address(text.pfn) + site.address % PAGE_SIZE, jump(site))
        if pfn != text.pfn:  # in all programs that run it here, so that their children have it from them
            for other in self.spaces():
                if other.pages.get(page, 0) >> 2 == pfn:
                    other.exchange(page, text.pfn)
        return True

    def _site(self, address: int, code: bytes) -> Site | None:
        """With its thunk; None: there is no room for one."""
        made = self._made.get((address, code))
        if made is not None:
            return made
        near = len(code) == 10
        free = (n for n in range(0 if near else self._next, NR_THUNKS) if n not in self._thunks)
        number = next((n for n in free if not near or reaches(address, THUNKS + n * THUNK)), None)
        if number is None or self._slots == SLOTS:
            return None
        site = Site(address, code, THUNKS + number * THUNK, 0 if near else TABLE + 8 * self._slots)
        self._put(site.thunk, thunk(site, CODE + self.image.enter))
        if not near:
            self._put(site.slot, site.thunk.to_bytes(8, "little"))
            self._next, self._slots = number + 1, self._slots + 1
        self._pages.setdefault(address >> PAGE_SHIFT, []).append(site)
        self._thunks[number] = self._made[address, code] = site
        return site

    # ---- patched text

    def text(self, inode: Any, index: int, page: int) -> Text | None:
        """The patched copy of a file's page at a page of the program's, if there is one of the file as it is now."""
        generation, texts = self._texts.get(ref(inode), (-1, {}))
        if generation != inode.generation:
            self._forget(ref(inode))
            return None
        return texts.get((index, page))

    def _copy(self, inode: Any, index: int, page: int, pfn: int) -> Text:
        text = Text(self.frames.copy(pfn))
        self._texts.setdefault(ref(inode, self._forget), (inode.generation, {}))[1][index, page] = text
        return text

    def _forget(self, file: ref[Any]) -> None:
        """The file is gone or has changed; who runs the old one keeps its pages."""
        for text in self._texts.pop(file, (0, {}))[1].values():
            self.frames.drop(text.pfn)

    def shrink(self) -> int:
        """Give up what no program maps, else files that programs have; how many frames."""
        freed = 0
        for _, texts in self._texts.values():
            for key in [key for key, text in texts.items() if self.frames.references[text.pfn] == 1]:
                self.frames.drop(texts.pop(key).pfn)
                freed += 1
        for lent in [] if freed else list(self.lent):
            freed += lent.give_up()
        return freed

    def restore(self, page: int, pfn: int) -> None:
        """A frame that was at a page of some program has its own bytes where there were patches."""
        for site in self._pages.get(page, ()):
            code, address = jump(site), self.frames.address(pfn) + site.address % PAGE_SIZE
            if memory.read(address, len(code)) == code:
                memory.write(address, site.code)

    # ---- from an address to its site

    def at(self, page: int) -> bool:
        """Whether some program's page there has had patches."""
        return page in self._pages

    def of_thunk(self, address: int) -> Site | None:
        return self._thunks.get((address - THUNKS) // THUNK)

    def of_hole(self, space: Any, address: int) -> Site | None:
        """Whose instruction was there, if in this program's memory it is not any more."""
        for site in self._pages.get(address >> PAGE_SHIFT, ()):
            if address == site.syscall or (site.near and address == site.behind):
                code = jump(site)
                if space.copy_in(site.address, len(code)) == code:
                    return site
        return None


def patchable(vma: Vma) -> bool:
    """Text of a file, which is this program's to run and not to write."""
    return vma.file is not None and not vma.shared and vma.prot & (PROT_EXEC | PROT_WRITE) == PROT_EXEC


def index_of(vma: Vma, page: int) -> int:
    """Of a page of the area in its file."""
    return vma.offset + (page << PAGE_SHIFT) - vma.start >> PAGE_SHIFT


def recognized(page: bytes, back: int, number: int) -> bytes:
    """The code of a site whose `syscall` ends at `back`; b"": none that can be patched, or not all of it in this page."""
    if page[back - 2 : back] != b"\x0f\x05" or back < 8:
        return b""
    if page[back - 7] == 0xB8 and page[back - 6 : back - 2] == struct.pack("<I", number) and page[back - 8] not in LONGER:
        return page[back - 7 : back]
    if page[back - 4 : back - 2] != b"\x31\xc0" or page[back : back + 2] != b"\x48\x3d" or back + CMP > PAGE_SIZE:
        return b""
    return page[back - 4 : back + CMP] if number == 0 and page[back - 5] not in LONGER else b""


def reaches(address: int, thunk_at: int) -> bool:
    """Whether a jump there leaves invalid instructions where the second form's `syscall` and `cmp` begin."""
    distance = thunk_at - (address + 5)
    return -(1 << 25) <= distance < 0 and distance >> 8 & 0xFF in INVALID  # the last byte is fe or ff: with 3d, no instruction


def jump(site: Site) -> bytes:
    """What a site's first bytes become."""
    if site.near:
        return b"\xe9" + struct.pack("<i", site.thunk - (site.address + 5))
    return b"\xff\x24\x25" + struct.pack("<I", site.slot)


def thunk(site: Site, enter: int) -> bytes:
    """At most THUNK bytes, for site.thunk. `enter`: of the calls that are served in C."""
    if site.near:
        head = b"\xb9" + struct.pack("<I", site.back) + b"\x31\xc0"  # mov $back,%ecx; xor %eax,%eax
        head += b"\xe9" + struct.pack("<i", enter - (site.thunk + len(head) + 5))  # jmp enter
        tail = site.code[4:10]  # cmp
        tail += b"\xe9" + struct.pack("<i", site.address + 10 - (site.thunk + TAIL + CMP + 5))
        return head.ljust(TAIL, b"\x06") + tail
    code = b"\x48\xb9" + struct.pack("<Q", site.back)  # movabs $back,%rcx
    if site.number in WORDS:
        return code + b"\x8b\x04\x25" + struct.pack("<I", DATA + WORDS[site.number]) + b"\xff\xe1"  # mov word,%eax; jmp *%rcx
    code += site.code[:5]  # mov $number,%eax
    if site.number in FILE_CALLS:
        return code + b"\xe9" + struct.pack("<i", enter - (site.thunk + len(code) + 5))
    return code + b"\xff\x24\x25" + struct.pack("<I", TABLE)  # jmp *gate
