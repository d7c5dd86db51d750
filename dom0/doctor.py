"""`ring1 doctor`: what this host enforces, by name, and a self-test that tries to get out.

The attempts (dom0/programs/escape.py) run in throw-away domains of a throw-away host. A seeded hole, the filter left off,
shows that the self-test can fail.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from dom0 import client
from dom0.client import Connection
from dom0.programs import escape
from dom0.programs.escape import Attempt

FRAMES = 8192
BATCH = 12  # attempts a domain makes that it survives: their names fit its command line
PROGRAM = Path(escape.__file__)


def examine(hole: bool = False) -> dict[str, Any]:
    """Probe, try, report. `ok` is false where an attempt was not refused. Raises HostError where no host can run."""
    with tempfile.TemporaryDirectory(prefix="ring1-doctor-") as folder:
        state = Path(folder) / "state"
        client.up(state, FRAMES)
        try:
            with Connection(state) as host:
                facts = host.ask("host")
                groups = _groups(escape.attempts())
                # Without a filter some attempts would harm the host they are made in: the first group begins with one
                # that does not, and ends there.
                rows = [row for group in (groups[:1] if hole else groups) for row in _try(host, group, hole)]
        finally:
            client.down(state)
    return {
        "user": os.getuid(),
        "isolation": facts["isolation"],
        "layers": facts["layers"],
        "hole": hole,
        "attempts": rows,
        "refused": sum(row["refused"] for row in rows),
        "ok": all(row["refused"] for row in rows),
    }


def _groups(attempts: list[Attempt]) -> list[list[Attempt]]:
    """What one domain tries: several that it survives, or one that it does not."""
    survived = [a for a in attempts if isinstance(a.verdict, int)]
    deadly = [[a] for a in attempts if isinstance(a.verdict, str)]
    return [survived[i : i + BATCH] for i in range(0, len(survived), BATCH)] + deadly


def _try(host: Connection, group: list[Attempt], hole: bool) -> list[dict[str, Any]]:
    tree = {"name": "escapee", "kernel": str(PROGRAM), "memory": 1, "cmdline": ",".join(a.name for a in group)}
    host.ask("create", tree=tree, unfiltered=hole)
    said = _listen(host)
    end = host.ask("wait", name="escapee")["reason"]
    rows = []
    for attempt in group:
        if isinstance(attempt.verdict, str):
            result, refused = end, end.startswith(attempt.verdict)
        else:
            result = said.get(attempt.name, f"not reached: {end}")
            refused = result == str(-attempt.verdict)
        rows.append({"name": attempt.name, "result": result, "refused": refused})
    return rows


def _listen(host: Connection) -> dict[str, str]:
    """What the domain printed, until it ended."""
    with Connection(host.state) as console:
        console.ask("console", name="escapee")
        text = b""
        for message in console.messages():
            if "end" in message:
                break
            text += message["data"]
    lines = (line.partition("\t") for line in text.decode(errors="replace").splitlines())
    return {name: result for name, tab, result in lines if tab}


def print_report(report: dict[str, Any]) -> None:
    for line in report["isolation"]:
        print(line)
    print(f"{report['layers']} layers stand (uid {report['user']})")
    for row in report["attempts"]:
        if not row["refused"]:
            print(f"NOT REFUSED: {row['name']}: {row['result']}")
    print(f"self-test: {report['refused']} of {len(report['attempts'])} escape attempts by native code refused")
