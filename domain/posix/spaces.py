"""Spaces without a program, for the programs to come.

A space that a program has left keeps its tables, and the frames behind them, until another program has it: that one's tables
are made by difference, and where both are forks of one process, or run one file, there is hardly any. Nobody else gets the
frames meanwhile: a program that only pretended to end sees what was its own, and nothing that came later. Before a space is
given to another program, no code is left in its process that could run (`PageTable.expel`).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from domain.posix.errors import Errno
from domain.posix.memory import Memory
from hypervisor.public.errors import XenError

if TYPE_CHECKING:
    from domain.posix.frames import Frames
    from domain.posix.space import Space

IDLE = 8  # spaces kept
FEW = 2  # where fewer are idle a new one is made rather than waited for: who forks again and again takes turns with two
LEFT_PAGES = 512  # kept behind each
Program = tuple[int, bool]  # Memory.program


@dataclass(slots=True)
class Idle:
    space: Any
    left: dict[int, int]  # what was Memory.pages
    program: Program


class Spaces:
    """The idle ones, the one that was left last at the end."""

    def __init__(self, frames: Frames, make: Callable[[], Space]) -> None:
        """`make` raises MemoryError, XenError."""
        self._frames, self._make = frames, make
        self.idle: list[Idle] = []

    def take(self, program: Program) -> tuple[Space, dict[int, int]]:
        """One that `program` has left, or a new one, or whichever there is; and what is left in it. Raises Errno(ENOMEM,
        EAGAIN)."""
        found = self.find(program, len(self.idle) < FEW)
        if found is not None:
            return found
        if len(self.idle) < IDLE:
            try:
                return self._make(), {}
            except (MemoryError, XenError) as error:
                if not self.idle:
                    raise Errno(errno.ENOMEM if isinstance(error, MemoryError) else errno.EAGAIN) from error
        while self.idle:
            if found := self._use(self.idle[0]):
                return found
        raise Errno(errno.EAGAIN)

    def settle(self) -> None:
        """There is nothing else to do: no code is left in any."""
        if self.idle:
            self.idle[-1].space.settle()

    def find(self, program: Program, at_once: bool = False) -> tuple[Space, dict[int, int]] | None:
        """One that `program` has left, the one that it left first, if there is one; `at_once`: that need not be waited for."""
        for idle in list(self.idle):
            if idle.program == program and not (at_once and not idle.space.is_expelled) and (found := self._use(idle)):
                return found
        return None

    def _use(self, idle: Idle) -> tuple[Space, dict[int, int]] | None:
        """None: its process is dead, or does not give its turn back."""
        self.idle = [other for other in self.idle if other is not idle]
        idle.space.expelled()
        if not idle.space.dead:
            return idle.space, idle.left
        self._empty(idle)
        idle.space.destroy()
        return None

    def put(self, memory: Memory) -> None:
        """Nobody runs in it any more."""
        space: Any = memory.table
        left: dict[int, int] = {}
        if space.dead or len(memory.pages) > LEFT_PAGES:
            memory.clear()
        else:
            try:
                left = memory.leave()
            except MemoryError:
                memory.clear()
        if space.dead:
            space.destroy()
            return
        if left:
            space.expel()
        self.idle.append(Idle(space, left, memory.program))
        if len(self.idle) > IDLE:
            oldest = self.idle.pop(0)
            self._empty(oldest)
            oldest.space.destroy()

    def shrink(self) -> int:
        """Nothing is left in any of them; how many frames are free for it."""
        before = self._frames.used
        for idle in self.idle:
            self._empty(idle)
        return before - self._frames.used

    def _empty(self, idle: Idle) -> None:
        idle.space.clear()
        self._frames.in_force()
        for value in idle.left.values():
            self._frames.drop(value >> 2)
        idle.left = {}
