"""A space of the mechanism's (domain/user.py): a process of the host's, its user root, and its control pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from domain import user
from domain.posix.pagetable import UserTable
from domain.posix.registers import RIP
from domain.posix.space import DEAD, SYSCALL, UPCALL, Space
from hypervisor.public.errors import NoSpace
from hypervisor.public.user import CONTROL_PAGES

if TYPE_CHECKING:
    from domain.kernel import Kernel


ANSWER_NS = 100_000_000
NOWHERE = 1 << 63  # no canonical address


class UserSpace(Space):
    """Raises MemoryError, XenError: nothing is held then. It is used again by another process when its own has ended."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self._kernel, self._memory = kernel, kernel.memory
        self._control = kernel.memory.alloc(CONTROL_PAGES)
        try:
            self._table = UserTable(kernel, self)
            try:
                self._user = user.UserSpace(kernel, self._table.root_mfn, self._control.pfns)
                if self._user.dead:
                    self._user.destroy()
                    raise NoSpace("its process died before it began")
            except BaseException:
                self._table.destroy()
                raise
        except BaseException:
            kernel.memory.free(self._control)
            raise
        self.direct, self._enter = self._user.came_direct, self._user.enter
        self.registers, self.arguments = self._user.registers, self._user.words  # type: ignore[assignment]
        self.map, self.unmap = self._table.map, self._table.unmap  # type: ignore[method-assign]
        self.map_all = self._table.map_all  # type: ignore[method-assign]
        self.flush, self.clear = self._table.flush, self._table.clear  # type: ignore[method-assign]
        self.expel, self.settle = self._table.expel, self._table.settle  # type: ignore[method-assign]

    @property
    def is_expelled(self) -> bool:
        return self._table.in_force

    @property
    def fpu(self) -> bytes:
        return self._user.fpu

    @fpu.setter
    def fpu(self, state: bytes) -> None:
        self._user.fpu = state

    def expelled(self) -> None:
        """It is given the turn at an address that there is not: with no code left, only the gate, whose return is an exception
        then, gives it back. A fault would ask the hypervisor first, which takes ten times as long."""
        self.settle()
        self.registers[RIP] = NOWHERE
        while (kind := self._user.run(ANSWER_NS)) == UPCALL:
            self._kernel._look(False)
        self.dead = kind == DEAD

    def run(self, timeout_ns: int) -> int:
        user = self._user
        kind = self._enter(timeout_ns)
        if kind != SYSCALL:
            kind = user.came(kind)  # which may find that it made one meanwhile
        if kind == SYSCALL:
            self.number, self.native = user.numbers[0], user.natives[0] == 1
        else:
            self.address, self.error, self.vector = user.address, user.error, user.vector
            self.dead = kind == DEAD
        return kind

    def destroy(self) -> None:
        self.dead = True
        self._user.destroy()
        self._table.destroy()
        self._memory.free(self._control)
