"""The control socket: one msgpack map in, one out, for the CLI and for scripts.

    {"do": verb, argument: value, ...}  ->  {"ok": result}  or  {"error": sentence, "exit": code}

`console` answers {"ok": None} and then carries {"data": bytes} both ways, until {"end": exit code, "reason": ..}. What was
typed waits for the guest, up to 4096 bytes (the oldest are dropped past that); {"took": n} says that n of them left.
The socket lies in the state directory (0700) and asks SO_PEERCRED: our uid or root, nobody else.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack

from dom0 import config, verbs
from dom0.toolstack import Guest, Toolstack, ToolstackError
from domain.sched import Event

if TYPE_CHECKING:
    from domain.kernel import Kernel

MAX_REQUEST = 1 << 20
MAX_UNSENT = 1 << 20  # a client that does not read loses its connection
PEERCRED = struct.Struct("3i")


class Client:
    """One connection. Reading and writing have a descriptor each, so that both may be waited for."""

    def __init__(self, kernel: Kernel, sock: socket.socket) -> None:
        self._kernel, self._sock = kernel, sock
        sock.setblocking(False)
        self._write_fd = os.dup(sock.fileno())
        self._unpacker = msgpack.Unpacker(max_buffer_size=MAX_REQUEST)
        self._unsent = b""
        self._wake = Event()
        self.closed = False
        self._writer = kernel.spawn(self._write(), name="control out")

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None when the client is gone or talks nonsense."""
        while True:
            try:
                for message in self._unpacker:
                    return message if isinstance(message, dict) else None
                await self._kernel.readable(self._sock.fileno())
                data = self._sock.recv(65536)
                if not data:
                    return None
                self._unpacker.feed(data)
            except BlockingIOError:
                continue
            except (OSError, ValueError, msgpack.UnpackException):
                return None

    def send(self, message: dict[str, Any]) -> None:
        """Never waits."""
        self._unsent += msgpack.packb(message)
        if len(self._unsent) > MAX_UNSENT:
            self.closed = True
        self._wake.set()

    async def _write(self) -> None:
        while not self.closed or self._unsent:
            if not self._unsent:
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                n = os.write(self._write_fd, self._unsent)
                self._unsent = self._unsent[n:]
            except BlockingIOError:
                await self._kernel.writable(self._write_fd)
            except OSError:
                self._unsent = b""
                self.closed = True

    async def close(self) -> None:
        """Send what is left, then go."""
        self.closed = True
        self._wake.set()
        await self._writer
        os.close(self._write_fd)
        self._sock.close()


class ControlServer:
    """Accepts and serves, one task a connection."""

    def __init__(self, kernel: Kernel, toolstack: Toolstack, state: Path) -> None:
        self._kernel, self._toolstack = kernel, toolstack
        self._path = state / "control"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    async def serve(self) -> None:
        """For ever. The socket appears under its name when it can be connected to: that is `ready`."""
        fresh = self._path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        self._sock.bind(str(fresh))
        self._sock.listen(16)
        self._sock.setblocking(False)
        fresh.rename(self._path)
        while True:
            await self._kernel.readable(self._sock.fileno())
            try:
                sock, _ = self._sock.accept()
            except OSError:
                continue
            _, uid, _ = PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEERCRED.size))
            if uid not in (0, os.getuid()):
                sock.close()
                continue
            self._kernel.spawn(self._serve(Client(self._kernel, sock)), name="control")

    async def _serve(self, client: Client) -> None:
        try:
            while not client.closed and (request := await client.receive()) is not None:
                await self._answer(client, request)
        finally:
            await client.close()

    async def _answer(self, client: Client, request: dict[str, Any]) -> None:
        verb = request.pop("do", None)
        try:
            if verb == "console":
                await self._console(client, **request)
                return
            handler = verbs.TABLE.get(verb) if isinstance(verb, str) else None
            if handler is None:
                raise ToolstackError(f"no verb {verb!r}", exit_code=2)
            client.send({"ok": await handler(self._toolstack, **request)})
        except (ToolstackError, config.ConfigError) as error:
            client.send({"error": str(error), "exit": getattr(error, "exit_code", 1)})
        except TypeError as error:
            client.send({"error": f"{verb}: {error}", "exit": 2})
        except Exception as error:  # our own mistake: it costs this request, not every domain of the host
            *_, where = traceback.extract_tb(error.__traceback__)
            self._toolstack.log(f"BUG in {verb}: {type(error).__name__}: {error} ({where.filename}:{where.lineno})")
            client.send({"error": f"{verb}: {type(error).__name__}: {error}; `ring1 dmesg` says where", "exit": 1})

    # ---- consoles

    async def _console(self, client: Client, name: str) -> None:
        """Attach until either side ends it."""
        guest = self._toolstack.find(name, alive=False)
        client.send({"ok": None})

        def show(data: bytes) -> None:
            client.send({"data": data})

        def took(count: int) -> None:
            client.send({"took": count})

        guest.console.attach(show, took)
        watcher = self._kernel.spawn(self._say_end(client, guest), name="console end")
        while (message := await client.receive()) is not None and isinstance(data := message.get("data"), bytes):
            guest.console.type(data)
        guest.console.detach(show)
        watcher.cancel()
        client.closed = True

    async def _say_end(self, client: Client, guest: Guest) -> None:
        await guest.buried.wait()
        assert guest.info is not None
        client.send({"end": guest.info.exit_code, "reason": guest.info.reason})
