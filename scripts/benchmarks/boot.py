"""Starting things: a domain to the first line of its program, beside a bare fork of a warm Python and a bare Python's start.

f1 an idle domain of 1 MiB from the request to its first line; f2 its end, to the last frame back; f3 a whole host: hypervisor,
zygote, dom0 and two driver domains, up and down.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dom0 import client
from scripts.benchmarks.harness import Failed, Row
from scripts.benchmarks.host import host

IDLE = Path(client.__file__).parent / "programs" / "idle.py"
PATIENCE = 10.0
clock = time.monotonic_ns


def create() -> float:
    """ms from the request to the program's first line, by the clock that both read."""
    machine = host()
    boot_ns = machine.connection.ask("host")["boot_ns"]
    begin = clock()
    tree = {"name": "idle", "kernel": str(IDLE), "memory": 1}
    domid = machine.connection.ask("create", tree=tree)["domid"]
    end = time.monotonic() + PATIENCE
    while not (said := machine.connection.ask("store-read", path=f"/local/domain/{domid}/data/ready")):
        if time.monotonic() > end:
            raise Failed("the domain is not ready")
    machine.connection.ask("destroy", name="idle")
    return (int(said) + boot_ns - begin) / 1e6


def destroy() -> float:
    """ms until the answer, which comes when nothing of it is left."""
    machine = host()
    machine.connection.ask("create", tree={"name": "idle", "kernel": str(IDLE), "memory": 1})
    begin = clock()
    machine.connection.ask("destroy", name="idle")
    return (clock() - begin) / 1e6


def fork() -> float:
    """ms: fork of this process, and the child's first word over a pipe."""
    read, write = os.pipe()
    begin = clock()
    pid = os.fork()
    if pid == 0:
        os.write(write, b"x")
        os._exit(0)
    os.read(read, 1)
    took = (clock() - begin) / 1e6
    os.waitpid(pid, 0)
    os.close(read)
    os.close(write)
    return took


def reap() -> float:
    """ms: SIGKILL of a forked child until it is reaped."""
    pid = os.fork()
    if pid == 0:
        while True:
            time.sleep(60)
    begin = clock()
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return (clock() - begin) / 1e6


def python(*arguments: str) -> float:
    """ms: exec of an interpreter until it has said a word."""
    begin = clock()
    with subprocess.Popen([sys.executable, "-I", *arguments], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.read(1)
        took = (clock() - begin) / 1e6
    return took


def whole() -> float:
    """ms: up and down."""
    with tempfile.TemporaryDirectory(prefix="ring1-bench-") as folder:
        begin = clock()
        client.up(Path(folder) / "state", 8192)
        client.down(Path(folder) / "state")
        return (clock() - begin) / 1e6


def rows(quick: bool) -> list[Row]:
    bare = "print(1)"
    three = "import msgpack, msgspec, cffi, posix_ipc; print(1)"
    return [
        Row(
            "f1", "a domain, from the request to its program's first line", "ms", "less", create, fork,
            "a bare fork of a warm Python", {"python -I -c 'print(1)'": lambda: python("-c", bare)},
        ),
        Row("f2", "a domain, from destroy to its last frame back", "ms", "less", destroy, reap, "SIGKILL and reap of a fork"),
        Row(
            "f3", "a host with dom0 and two driver domains, up and down", "ms", "less", whole, lambda: python("-c", bare),
            "one start of a bare Python", {"python with msgpack, msgspec, cffi and posix_ipc": lambda: python("-c", three)},
        ),
    ]  # fmt: skip
