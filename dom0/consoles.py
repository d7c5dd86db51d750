"""dom0's end of a domain's console: a bounded log, and whoever is attached.

Guest bytes are kept as they came; only an attached terminal gets them raw, everybody else escapes them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from domain.sched import Event
from hypervisor.public.io import console as abi
from ringlib.bytering import ByteRing
from ringlib.ring import Broken

if TYPE_CHECKING:
    from domain.kernel import Kernel

KEEP_BYTES = 64 << 10
FILE_BYTES = 1 << 20  # a log file is rotated once past this
INPUT_BYTES = 4096


class ConsoleServer:
    """Serves the console page mapped at host address `page`."""

    def __init__(self, kernel: Kernel, page: int, port: int, log: Path, report: Callable[[str], None]) -> None:
        self._kernel, self._port, self._log, self._report = kernel, port, log, report
        self._in = ByteRing(page + abi.OUT, page + abi.OUT_CONS, page + abi.OUT_PROD, abi.OUT_BYTES)
        self._out = ByteRing(page + abi.IN, page + abi.IN_CONS, page + abi.IN_PROD, abi.IN_BYTES)
        self._log_failed = False
        self.history = b""
        self._input = b""
        self._subscribers: dict[Callable[[bytes], None], Callable[[int], None]] = {}
        self.ended = Event()
        self._task = kernel.spawn(self._serve(), name="console")

    def attach(self, subscriber: Callable[[bytes], None], took: Callable[[int], None]) -> None:
        """Hand everything printed so far, then what comes, to `subscriber`; to `took`, how many keys left for the guest."""
        if self.history:
            subscriber(self.history)
        self._subscribers[subscriber] = took

    def detach(self, subscriber: Callable[[bytes], None]) -> None:
        self._subscribers.pop(subscriber, None)

    def type(self, data: bytes) -> None:
        """Keys for the guest; of what it does not read the oldest are dropped past INPUT_BYTES, and all once it ended."""
        self._input = (self._input + data)[-INPUT_BYTES:]
        self._push()

    def close(self) -> None:
        """Take what it printed last, then let go of the page: nothing may touch it from here on. Idempotent."""
        self._take()
        self._let_go()

    def _let_go(self) -> None:
        self._task.cancel()
        self.ended.set()

    def _violated(self, error: Broken) -> None:
        """Said once: the ring is not looked at again."""
        self._report(f"console ring violated: {error}")
        self._let_go()

    async def _serve(self) -> None:
        while True:
            await self._kernel.evtchn.wait(self._port)
            self._take()
            self._push()

    def _take(self) -> None:
        try:
            data = self._in.read() if not self.ended.is_set else b""
        except Broken as error:
            self._violated(error)
            return
        if data:
            self.history = (self.history + data)[-KEEP_BYTES:]
            self._write_log(data)
            for subscriber in list(self._subscribers):
                subscriber(data)
            try:
                self._kernel.evtchn.send(self._port)
            except Exception:
                pass  # it ended meanwhile; its last words were taken

    def _push(self) -> None:
        try:
            n = self._out.write(self._input) if self._input and not self.ended.is_set else 0
        except Broken as error:
            self._violated(error)
            return
        self._input = self._input[n:]
        if n:
            self._kernel.evtchn.send(self._port)
            for took in list(self._subscribers.values()):
                took(n)

    def _write_log(self, data: bytes) -> None:
        """A log that cannot be written is said once, and done without."""
        try:
            if self._log.exists() and self._log.stat().st_size + len(data) > FILE_BYTES:
                self._log.replace(self._log.with_suffix(".log.1"))
            with self._log.open("ab") as file:
                file.write(data)
        except OSError as error:
            if not self._log_failed:
                self._log_failed = True
                self._report(f"console log: {error.strerror}")
