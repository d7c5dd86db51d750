"""A space of the mechanism's (domain/user.py): a process of the host's, its user root, and its control pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from domain import user
from domain.posix.pagetable import UserTable
from domain.posix.space import DEAD, SYSCALL, Space
from hypervisor.public.user import CONTROL_PAGES

if TYPE_CHECKING:
    from domain.kernel import Kernel


class UserSpace(Space):
    """Raises MemoryError, XenError. It is used again by another process when its own has ended."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self._table = UserTable(kernel)
        control = kernel.memory.alloc(CONTROL_PAGES)
        self._user = user.UserSpace(kernel, self._table.root_mfn, control.pfns)
        self.registers, self.arguments = self._user.registers, self._user.words  # type: ignore[assignment]
        self.map, self.unmap = self._table.map, self._table.unmap  # type: ignore[method-assign]
        self.flush, self.clear = self._table.flush, self._table.clear  # type: ignore[method-assign]

    @property
    def fpu(self) -> bytes:
        return self._user.fpu

    @fpu.setter
    def fpu(self, state: bytes) -> None:
        self._user.fpu = state

    def run(self, timeout_ns: int) -> int:
        user = self._user
        kind = user.run(timeout_ns)
        if kind == SYSCALL:
            self.number, self.native = user.number, user.native
        else:
            self.address, self.error, self.vector = user.address, user.error, user.vector
            self.dead = kind == DEAD
        return kind
