"""A host for a benchmark: started when it is first needed, in a state directory of its own, ended with the process.

Guests of it run scripts/benchmarks/guest.py, do what their command line says, print one JSON object, and end.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dom0 import client
from dom0.client import Connection
from scripts.benchmarks.harness import Failed

GUEST = Path(__file__).parent / "guest.py"
FRAMES = 16384


class Host:
    """One host; `pid` is the hypervisor's."""

    def __init__(self, frames: int = FRAMES) -> None:
        self._folder = tempfile.mkdtemp(prefix="ring1-bench-")
        atexit.register(self._end)
        self.state = Path(self._folder) / "state"
        self.pid = client.up(self.state, frames)
        self.connection = Connection(self.state)
        self._names = 0

    def _end(self) -> None:
        if client.is_running(self.state):
            client.down(self.state)
        shutil.rmtree(self._folder, ignore_errors=True)

    def guest(self, cmdline: str, cpu: int, kernel: Path = GUEST, memory: int = 4, **more: Any) -> Guest:
        """A paused domain, pinned. more: what else its configuration says."""
        self._names += 1
        name = f"bench-{self._names}"
        tree = {"name": name, "kernel": str(kernel), "memory": memory, "cmdline": cmdline, **more}
        domid = self.connection.ask("create", tree=tree, paused=True)["domid"]
        pid = self.connection.ask("info", name=name)["pid"]
        os.sched_setaffinity(pid, {cpu})
        return Guest(self, name, domid, pid)

    def run(self, cmdlines: Sequence[str], cpus: Sequence[int], hypervisor: int) -> dict[str, Any]:
        """Guests side by side, told each other's numbers as peer=N; what the first one said. All end with it."""
        os.sched_setaffinity(self.pid, {hypervisor})
        guests = [self.guest(cmdline, cpu) for cmdline, cpu in zip(cmdlines, cpus, strict=True)]
        for i, guest in enumerate(guests):
            peer = guests[1 - i].domid if len(guests) == 2 else 0
            self.connection.ask("store-write", path=f"/local/domain/{guest.domid}/data/peer", value=str(peer))
        for guest in reversed(guests):
            self.connection.ask("unpause", name=guest.name)
        try:
            return guests[0].said() | {"others": [self.connection.ask("info", name=guest.name) for guest in guests[1:]]}
        finally:
            for guest in guests[1:]:
                guest.end()


class Guest:
    """One domain of a benchmark."""

    def __init__(self, host: Host, name: str, domid: int, pid: int) -> None:
        self._host, self.name, self.domid, self.pid = host, name, domid, pid

    def said(self) -> dict[str, Any]:
        """What it printed, when it has ended. Raises Failed."""
        text, end = b"", {"end": -1, "reason": "its host ended"}
        with Connection(self._host.state) as console:
            console.ask("console", name=self.name)
            for message in console.messages():
                if "end" in message:
                    end = message
                    break
                text += message["data"]
        if end["end"] != 0:
            raise Failed(f"{self.name}: {end['reason']}\n{text.decode(errors='replace')}")
        result: dict[str, Any] = json.loads(text)
        return result

    def end(self) -> None:
        self._host.connection.ask("destroy", name=self.name)


_host: list[Host] = []


def host() -> Host:
    """The one of this process."""
    if not _host:
        _host.append(Host())
    return _host[0]
