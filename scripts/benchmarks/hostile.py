"""Rows p14 of the paging benchmark: the p99 of a domain's hypercalls beside a guest that does its worst to its own memory map.

p14-flush throws everything out and faults it in again; p14-flip changes a live table with every call; p14-pins validates trees
of tables and takes them apart; p14-unhook takes a live table out and puts it back. The victim and the hypervisor share a CPU,
the hostile one and its monitor have the other.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from dom0.client import Connection
from scripts.benchmarks.harness import Row, cpus
from scripts.benchmarks.host import host
from scripts.benchmarks.hypercalls import undisturbed, victim

GUEST = Path(__file__).parent / "hostile_guest.py"
MEMORY = 8  # MiB
STORMS = ("flush", "flip", "pins", "unhook")
GATE = 3.0


def beside(what: str, count: int) -> float:
    """us: the victim's p99 while the hostile one is at it."""
    _, other = cpus()
    machine = host()
    hostile = machine.guest(f"what={what}", other, GUEST, MEMORY)
    os.sched_setaffinity(machine.connection.ask("info", name=hostile.name)["monitor_pid"], {other})
    machine.connection.ask("unpause", name=hostile.name)
    try:
        with Connection(machine.state) as console:
            console.ask("console", name=hostile.name)
            next(iter(console.messages()))  # it has begun
        return victim(count, "p99")
    finally:
        hostile.end()


def rows(quick: bool) -> list[Row]:
    count = 3000 if quick else 12_000
    limit, quiet = partial(undisturbed, count, "p99"), "the same without it, the other CPU kept busy"
    return [
        Row(
            f"p14-{what}", f"p99 of calls beside one that does {what}", "us", "less", partial(beside, what, count), limit,
            quiet, gate=GATE,
        )
        for what in STORMS
    ]  # fmt: skip
