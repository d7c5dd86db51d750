"""The guest's end of its console."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from domain.sched import Event
from hypervisor.public.io import console as abi
from hypervisor.public.layout import CONSOLE_PFN, virt
from ringlib.bytering import ByteRing
from ringlib.ring import Broken

if TYPE_CHECKING:
    from domain.kernel import Kernel

BACKLOG = 64 << 10  # bytes kept while nobody reads: printed, older ones are dropped; typed, no more are taken


class Console:
    """write() never waits; readline() and drained() do."""

    def __init__(self, kernel: Kernel) -> None:
        page = kernel.start.window + virt(CONSOLE_PFN)
        self._kernel, self._port = kernel, kernel.start.console_evtchn
        self._out = ByteRing(page + abi.OUT, page + abi.OUT_CONS, page + abi.OUT_PROD, abi.OUT_BYTES)
        self._in = ByteRing(page + abi.IN, page + abi.IN_CONS, page + abi.IN_PROD, abi.IN_BYTES)
        self._backlog = b""
        self._input = b""
        self._arrived, self._empty = Event(), Event()
        self._empty.set()
        self.dropped = 0
        kernel.spawn(self._serve(), name="console")

    def write(self, data: str | bytes) -> None:
        """Print; what does not fit the ring waits here, up to BACKLOG bytes."""
        self._backlog += data.encode(errors="replace") if isinstance(data, str) else data
        if len(self._backlog) > BACKLOG:
            self.dropped += len(self._backlog) - BACKLOG
            self._backlog = self._backlog[-BACKLOG:]
        self._push()

    @property
    def waiting(self) -> int:
        """Bytes written that the ring had no room for yet."""
        return len(self._backlog)

    async def read(self) -> bytes:
        """Bytes typed so far, at least one."""
        while not self._input:
            self._arrived.clear()
            await self._arrived.wait()
        data, self._input = self._input, b""
        self._take()
        return data

    async def readline(self) -> str:
        """A line, with its newline; one that is longer than BACKLOG is cut there."""
        while b"\n" not in self._input and len(self._input) < BACKLOG:
            self._arrived.clear()
            await self._arrived.wait()
        line, newline, self._input = self._input.partition(b"\n")
        self._take()
        return (line + newline).decode(errors="replace")

    async def drained(self) -> None:
        """Until dom0 has taken everything that was written: what is in the ring when we end is lost."""
        await self._empty.wait()

    def stream(self) -> io.TextIOBase:
        """A text stream for sys.stdout."""
        return _Stream(self)

    def _push(self) -> None:
        try:
            n = self._out.write(self._backlog) if self._backlog else 0
        except Broken:
            self._backlog, n = b"", 0  # dom0 broke it: nothing of ours depends on it
        self._backlog = self._backlog[n:]
        if n:
            self._kernel.evtchn.send(self._port)
        if self._backlog or self._out.used:
            self._empty.clear()
        else:
            self._empty.set()

    async def _serve(self) -> None:
        while True:
            await self._kernel.evtchn.wait(self._port)
            self._push()
            self._take()

    def _take(self) -> None:
        """What was typed, unless enough of it waits already: the rest stays in the ring, and dom0 sees no room."""
        try:
            data = self._in.read() if len(self._input) < BACKLOG else b""
        except Broken:
            return  # dom0 broke it: nothing more is read
        if data:
            self._input += data
            self._kernel.evtchn.send(self._port)
            self._arrived.set()


class _Stream(io.TextIOBase):
    def __init__(self, console: Console) -> None:
        self._console = console

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._console.write(text)
        return len(text)
