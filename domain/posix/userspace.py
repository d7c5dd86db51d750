"""A space of the mechanism's (domain/user.py): a process of the host's, its user root, and its control pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from domain import user
from domain.posix.pagetable import UserTable
from domain.posix.space import DEAD, SYSCALL, Space
from hypervisor.public.errors import XenError
from hypervisor.public.user import CONTROL_PAGES

if TYPE_CHECKING:
    from domain.kernel import Kernel


class UserSpace(Space):
    """Raises MemoryError, XenError. It is used again by another process when its own has ended, unless it is dead."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self._table = UserTable(kernel)
        self._memory, self._control = kernel.memory, kernel.memory.alloc(CONTROL_PAGES)
        try:
            self._user = user.UserSpace(kernel, self._table.root_mfn, self._control.pfns)
        except XenError:
            self._release()
            raise
        self.registers, self.arguments = self._user.registers, self._user.words  # type: ignore[assignment]
        self.map, self.unmap = self._table.map, self._table.unmap  # type: ignore[method-assign]
        self.flush, self.clear = self._table.flush, self._table.clear  # type: ignore[method-assign]

    def destroy(self) -> None:
        """End its process; what it was made of is the kernel's again."""
        self._user.destroy()
        self._release()

    def _release(self) -> None:
        self._table.destroy()
        self._memory.free(self._control)

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
