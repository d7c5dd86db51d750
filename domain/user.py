"""Programs in address spaces of their own: a kernel lets one run, and is told why it came back.

    space = UserSpace(kernel, root_mfn, control_pfns)
    space.registers[RIP], space.registers[RSP] = entry, stack
    while (kind := space.run(-1)) == SYSCALL:
        space.registers[RAX] = serve(space.number, *space.arguments)

A system call costs two switches of the host's and no hypercall. Taking the CPU from a program that runs costs one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from domain import memory
from domain._guest import ffi, lib
from domain.traps import set_traps
from hypervisor.public.errors import NoEntry
from hypervisor.public.layout import KERNEL_WINDOW, VIRT_BASE
from hypervisor.public.mmu import MmuextCommand
from hypervisor.public.traps import TI_DPL, TI_FAST, Vector
from hypervisor.public.types import PAGE_SIZE
from hypervisor.public.user import CONTROL_BYTES, CONTROL_PAGES, TURN_PROGRAM, UserDestroy, UserInterrupt

if TYPE_CHECKING:
    from domain.kernel import Kernel

SYSCALL, FAULT, EXCEPTION, TIMEOUT, UPCALL, DEAD = range(6)  # why a program came back
START_NS = 5_000_000_000
AGAIN_NS, AGAIN = 10_000_000, 10  # a program that does not give the CPU back is told again, and given up: after 0.1 s
USER_CS, USER_SS = 0x33, 0x2B
CS, EFLAGS, SS = 17, 18, 20
COUNT = 27


class UserSpace:
    """One process that shows a user root."""

    def __init__(self, kernel: Kernel, root_mfn: int, control_pfns: Sequence[int]) -> None:
        """`control_pfns`: CONTROL_PAGES pages of this kernel's, side by side, that nobody uses while the space lives. Raises
        XenError: no process to be had (NoSpace), or the root is shown elsewhere (Busy)."""
        first = control_pfns[0]
        assert list(control_pfns) == list(range(first, first + CONTROL_PAGES)), "control pages lie side by side"
        if not hasattr(kernel, "_users_ready"):
            assert lib.user_init() == 0
            handler = int(ffi.cast("uintptr_t", ffi.addressof(lib, "user_run")))  # a system call is what it returns with
            set_traps(kernel, {Vector.SYSTEM_CALL: handler}, TI_FAST | TI_DPL)
            kernel._users_ready = True  # type: ignore[attr-defined]
        self._kernel, self.root_mfn, self.dead = kernel, root_mfn, False
        address = KERNEL_WINDOW + VIRT_BASE + first * PAGE_SIZE
        mfns = struct.pack(f"<{CONTROL_PAGES}Q", *(kernel.memory.p2m[pfn] for pfn in control_pfns))
        memory.write(address, bytes(CONTROL_BYTES))
        memory.write(address, struct.pack("<Q", TURN_PROGRAM))
        memory.write(address + PAGE_SIZE // 2, mfns)
        kernel.memory.mmu.run((MmuextCommand.NEW_USER_BASEPTR, root_mfn, address + PAGE_SIZE // 2 - KERNEL_WINDOW))
        memory.zero(address + PAGE_SIZE // 2, len(mfns))
        self._user: Any = ffi.new("struct user *", {"control": ffi.cast("char *", address), "shared_info": kernel._shared_info})
        self.enter: Callable[[int], int] = partial(lib.user_run, self._user)
        self.registers, self.words = self._view("registers"), self._view("arguments")
        # One word each, as the properties of these names, which cost twice as much to read.
        self.numbers, self.natives = self._view("number"), self._view("native", "I")
        self.came_direct = self._view("direct", "I")
        if lib.user_begin(self._user, START_NS) == lib.USER_DEAD:
            self.dead, self._user.lost = True, 1
        self._fresh = self.fpu
        self.registers[:] = memoryview(struct.pack(f"{COUNT}Q", *(0,) * COUNT)).cast("Q")
        self.registers[CS], self.registers[SS], self.registers[EFLAGS] = USER_CS, USER_SS, 0x202

    def _view(self, field: str, word: Literal["Q", "I"] = "Q") -> memoryview:
        """Words of it, as they are now and will be."""
        return memoryview(ffi.buffer(ffi.addressof(self._user, field))).cast("B").cast(word)

    # ---- running

    def run(self, timeout_ns: int) -> int:
        """Let the program go on, `timeout_ns` at most (-1: no limit); why it came back. What was asked of it is in `number`,
        `arguments`, `native`; `address`, `error`, `vector`; its registers in `registers`, until it runs again."""
        kind: int = self.enter(timeout_ns)
        return kind if kind == SYSCALL else self.came(kind)

    def came(self, kind: int) -> int:
        """The rest of `run`, of which `enter` is the first half: why it came back, where that was not plain at once."""
        if self.dead:
            return DEAD
        if kind == lib.USER_LATE:
            kind = self._take_back()
        if kind == DEAD:
            self.dead, self._user.lost = True, 1
        return kind

    def _take_back(self) -> int:
        """The hypervisor signals the program, whose gate hands over. One that has blocked the signal is dead to us: it is still
        there, and takes its share of the CPU until its space is destroyed."""
        upcall = self._user.upcall
        for _ in range(AGAIN):
            self._user.told = 1
            try:
                self._kernel.hypercall(UserInterrupt(self.root_mfn))
            except NoEntry:
                return DEAD
            kind: int = lib.user_wait(self._user, AGAIN_NS)
            if kind == TIMEOUT and upcall:
                return UPCALL
            if kind != lib.USER_LATE:
                return kind
        return DEAD

    # ---- what it came back with

    @property
    def number(self) -> int:
        """Of the system call."""
        return self._user.number  # type: ignore[no-any-return]

    @property
    def arguments(self) -> tuple[int, ...]:
        """Of the system call: six words, by the convention of its table. `words` has them too, until the program runs again."""
        return tuple(self._user.arguments)

    @property
    def native(self) -> bool:
        """An x86-64 call; else one of i386's or x32's numbers."""
        return bool(self._user.native)

    @property
    def address(self) -> int:
        """Of a page fault."""
        return self._user.address  # type: ignore[no-any-return]

    @property
    def error(self) -> int:
        """The error code of a page fault or exception."""
        return self._user.error  # type: ignore[no-any-return]

    @property
    def vector(self) -> int:
        """Of an exception."""
        return self._user.vector  # type: ignore[no-any-return]

    @property
    def direct(self) -> bool:
        """The system call came by the gate's direct entry."""
        return bool(self._user.direct)

    @property
    def traps(self) -> int:
        """How often it came back."""
        return self._user.traps  # type: ignore[no-any-return]

    # ---- the vector registers

    @property
    def fpu(self) -> bytes:
        """As the host stores them (XSAVE), a copy. The program may have written anything there: it is only its own to load.
        Of a program in a direct call this takes a signal of the host's."""
        self._frame()
        return bytes(ffi.buffer(self._user.control + self._user.fpu, self._user.fpu_bytes))

    @fpu.setter
    def fpu(self, state: bytes) -> None:
        state = state or self._fresh
        if len(state) != self._user.fpu_bytes:
            raise ValueError(f"{len(state)} bytes of vector registers, here they have {self._user.fpu_bytes}")
        self._frame()
        lib.memory_copy(self._user.control + self._user.fpu, ffi.from_buffer(state), len(state))

    def _frame(self) -> None:
        if not self.dead and lib.user_frame(self._user) == lib.USER_DEAD:
            self.dead, self._user.lost = True, 1

    # ---- the end

    def destroy(self) -> None:
        """End the process; the root and the control pages are this kernel's again. Idempotent."""
        self.dead, self._user.lost = True, 1
        try:
            self._kernel.hypercall(UserDestroy(self.root_mfn))
        except NoEntry:
            pass
