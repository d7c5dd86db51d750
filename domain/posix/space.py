"""A process of the host's that a program's address space is, as the run loop sees it.

`task` is whose registers it holds now; they are live, so that a system call costs no copy. Another thread of the same memory is
shown in it by exchanging them.
"""

from __future__ import annotations

from array import array
from collections.abc import MutableSequence, Sequence
from typing import TYPE_CHECKING

from domain.posix import registers as r

if TYPE_CHECKING:
    from domain.posix.task import Task

SYSCALL, FAULT, EXCEPTION, TIMEOUT, UPCALL, DEAD = range(6)  # why a program came back


class Space:
    """What a mechanism provides; of the page tables see memory.PageTable."""

    registers: MutableSequence[int]
    fpu: bytes  # b"" set: as a program starts
    number = -1  # SYSCALL: which
    arguments: Sequence[int] = ()  # until it runs again
    direct: Sequence[int] = (0,)  # one word: whether it came from a patched call site; likewise
    native = True  # an x86-64 call; False: i386's or x32's numbers, which there are none of here
    address = 0  # FAULT: where
    error = 0  # FAULT, EXCEPTION: the processor's code
    vector = 0  # EXCEPTION
    dead = False
    stale = True  # not all that was asked for is in force; one that cannot say is always

    def __init__(self) -> None:
        self.task: Task | None = None

    def map(self, page: int, pfn: int, write: bool, execute: bool) -> None:
        raise NotImplementedError

    def map_all(self, pages: dict[int, int], execute: bool) -> None:
        """Values of Memory.pages."""
        for page, value in pages.items():
            if value & 2:
                self.map(page, value >> 2, bool(value & 1), execute)
            else:
                self.unmap(page)

    def unmap(self, page: int) -> None:
        raise NotImplementedError

    def clear(self) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        raise NotImplementedError

    def expel(self) -> None:
        """Begin to take the code away from whoever still runs in its process."""

    @property
    def is_expelled(self) -> bool:
        """`expelled` would not have to wait for that."""
        return True

    def settle(self) -> None:
        """It is in force that its code is gone."""

    def expelled(self) -> None:
        """It is gone: the only thread there waits for its registers, or will when it next has the CPU."""

    def destroy(self) -> None:
        """Its process ends."""
        raise NotImplementedError

    def run(self, timeout_ns: int) -> int:
        """Let the program go on, at most so long (-1: for ever); why it came back."""
        raise NotImplementedError

    def show(self, task: Task) -> None:
        self.registers[0 : r.COUNT] = array("Q", task.registers)
        self.fpu = task.fpu
        task.registers, self.task = self.registers, task

    def hide(self, task: Task) -> None:
        task.registers, task.fpu, self.task = list(self.registers), self.fpu, None
