"""`ring1 mem-set` and `mem-max` on the user's side: sizes as xl takes them, and the wait until a domain has come to its target.

Keys of --json, in KiB: memory_kib (owned now), target_kib (asked for), maxmem_kib (owned at most), static_max_kib (what its
page tables have room for), stopped_kib (where its driver says it stopped; -1: nothing that can be read); and name, domid,
state, balloon (whether it says that it has a driver).
"""

from __future__ import annotations

import re
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from dom0.client import Connection, HostError
from hypervisor.public.types import PAGE_SIZE

SIZE = re.compile(r"([0-9]{1,12})([bkmgt]?)\Z", re.IGNORECASE)
SHIFT = {"b": 0, "k": 10, "m": 20, "": 20, "g": 30, "t": 40}
LOOK_SECONDS = 0.02  # how often it looks
USAGE = 2


def parse(text: str) -> int:
    """KiB, at least a page. Raises HostError, of exit code 2."""
    match = SIZE.match(text)
    size = int(match[1]) << SHIFT[match[2].lower()] if match else 0
    if not PAGE_SIZE <= size < 1 << 44:  # 16 TiB: a count of frames has 32 bits
        raise HostError(f"{text!r} is no size: MiB, or a number and one of b k m g t, from 4k on", USAGE)
    return size >> 10


def follow(host: Connection, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Until the domain owns what it was asked to; what `facts` are then. Raises HostError, which says why it does not."""
    start, target, end = facts["memory_kib"], facts["target_kib"], time.monotonic() + seconds
    bar = Progress(
        TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[now]} of {task.fields[target]} KiB"),
        console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task(facts["name"], total=abs(target - start), now=start, target=target)
        while facts["memory_kib"] != target:
            if facts["target_kib"] != target:
                raise HostError(f"{facts['name']} was given another target meanwhile: {facts['target_kib']} KiB")
            if time.monotonic() > end:
                raise HostError(_why(host, facts, seconds))
            time.sleep(LOOK_SECONDS)
            facts = host.ask("memory", name=str(facts["domid"]))
            bar.update(task, completed=abs(facts["memory_kib"] - start), now=facts["memory_kib"])
    return facts


def _why(host: Connection, facts: dict[str, Any], seconds: float) -> str:
    """What keeps it from its target, as far as one can tell, and what to do."""
    name, now, target = facts["name"], facts["memory_kib"], facts["target_kib"]
    if facts["state"] != "running":
        reason = f"it is {facts['state']}; `ring1 unpause {name}`"
    elif not facts["balloon"]:
        reason = "it says nothing of a balloon driver; end it, or give it a kernel that has one"
    elif facts["stopped_kib"] != now:
        reason = "it is on its way, or gives nothing; --timeout waits longer"
    elif now > target:
        reason = "the rest is in use there; it gives more when pages are freed, or ask for less of it"
    else:
        free = host.ask("host")["memory_free_kib"]
        reason = f"the machine has {free} KiB free; it gets more when others give some back"
    return f"{name} owns {now} KiB, not {target}, after {seconds:g} s: {reason}"
