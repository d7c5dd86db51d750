"""What every benchmark stands on: two processes, rounds in which ours, the limit and the peers take turns, and a report.

Absolute figures of a busy machine say little, so everything is a ratio within one round, of which the median counts; the
spread, (p90 - p10) / median of those ratios, says how far to believe it.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "bench"
PATIENCE = 30  # seconds: for one measurement; beyond it something hangs

Measure = Callable[[], float]
Absent = str  # why a peer is not measured


class Failed(Exception):
    """A measurement's process ended badly; what it said is on stderr."""


@dataclass(frozen=True)
class Row:
    """One line of the report: what of ours is held against which limit and which peers."""

    id: str  # a1 ...: a letter for what is measured, then its rows
    what: str
    unit: str
    better: str  # "more" or "less"
    ours: Measure | Absent  # absent: the row says so, and no gate is judged
    limit: Measure
    limit_is: str
    peers: dict[str, Measure | Absent] = field(default_factory=dict)
    gate: float | None = None  # of ours / limit: at least (more), at most (less)
    absolute: bool = False  # the gate is of ours, in the row's unit
    peer_gates: dict[str, float] = field(default_factory=dict)  # of ours / that peer, as gate; where it is not absent


# ---- two processes


def cpus() -> tuple[int, int]:
    """Two CPUs, the same one where there is but one."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[-1]


Meet = Callable[[], None]


def pair(
    server: Callable[[Meet], Any],
    client: Callable[[Meet], Any],
    *,
    pinned: bool = True,
    where: tuple[int, int] | None = None,
    forget: Callable[[], None] = lambda: None,
) -> tuple[Any, Any]:
    """Run both, each in a process of its own; what both returned, as JSON has it. Each calls `meet` once it is set up.

    pinned: each on a CPU of its own, or as `where` has it (client's, server's). forget: called here once both have what was
    made for them before the fork.
    """
    ends = [os.pipe(), os.pipe()]

    def side(work: Callable[[Meet], Any], mine: int) -> Callable[[], Any]:
        def meet() -> None:
            os.write(ends[1 - mine][1], b"m")
            if os.read(ends[mine][0], 1) != b"m":
                raise Failed("the other process failed")

        def begin() -> Any:
            os.close(ends[mine][1])
            return work(meet)

        return begin

    places = (where or cpus()) if pinned else (None, None)
    results = [start(side(server, 0), places[1]), start(side(client, 1), places[0])]
    for read, write in ends:
        os.close(read)
        os.close(write)
    forget()
    return result(*results[0]), result(*results[1])


def start(work: Callable[[], Any], cpu: int | None) -> tuple[int, int]:
    """Run `work` in a forked process on `cpu`: its pid, and a pipe for its result."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        status = 1
        try:
            os.close(read)
            signal.alarm(PATIENCE)
            gc.disable()
            if cpu is not None:
                os.sched_setaffinity(0, {cpu})
            os.write(write, json.dumps(work()).encode())
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    os.close(write)
    return pid, read


def result(pid: int, read: int) -> Any:
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    if os.waitpid(pid, 0)[1]:
        raise Failed("a measurement's process failed")
    return json.loads(text)


@contextmanager
def hog(cpu: int) -> Iterator[None]:
    """A process that wants `cpu` all the time."""

    def burn() -> None:
        while True:
            pass

    pid, read = start(burn, cpu)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)


def compiled(source: Path, sources: Sequence[Path], include: Path) -> tuple[Any, Any]:
    """ffi and lib of a C file that declares itself between cdef markers: built into build/bench when anything changed."""
    files = [source, *sources, *sorted(include.glob("*.h"))]
    name = f"_{source.stem}_{hashlib.sha256(b''.join(path.read_bytes() for path in files)).hexdigest()[:12]}"
    folder = BUILD / name
    if not folder.exists():
        declared = source.read_text().split("/* cdef begin */")[1].split("/* cdef end */")[0]
        builder = FFI()
        builder.cdef(declared)
        builder.set_source(
            name,
            declared,
            sources=[str(path) for path in (source, *sources)],
            include_dirs=[str(include)],
            extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"],
        )
        with tempfile.TemporaryDirectory(dir=BUILD.parent) as unfinished:
            builder.compile(tmpdir=unfinished)
            BUILD.mkdir(exist_ok=True)
            os.rename(shutil.copytree(unfinished, f"{unfinished}.built"), folder)
    found = list(folder.glob(f"{name}.*so"))
    spec = importlib.util.spec_from_file_location(name, found[0])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ffi, module.lib


# ---- rounds


def run(rows: Sequence[Row], rounds: int, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every row's results. In each round all that belongs to a row runs one after the other, from another one each time. A peer
    that fails is absent from then on."""
    values: dict[str, dict[str, list[float]]] = {row.id: {} for row in rows}
    rows = list(rows)
    for turn in range(rounds):
        for at, row in enumerate(rows):
            note(f"round {turn + 1} of {rounds}: {row.id} {row.what}")
            measures = list(_measures(row).items())
            for name, measure in [*measures[turn % len(measures) :], *measures[: turn % len(measures)]]:
                try:
                    values[row.id].setdefault(name, []).append(measure())
                except Failed as error:
                    if name not in row.peers:
                        raise
                    rows[at] = replace(rows[at], peers={**rows[at].peers, name: str(error)})
    note("")
    return [report(row, values[row.id]) for row in rows]


def _measures(row: Row) -> dict[str, Measure]:
    every = {"ours": row.ours, "limit": row.limit, **row.peers}
    return {name: measure for name, measure in every.items() if not isinstance(measure, str)}


def report(row: Row, values: dict[str, list[float]]) -> dict[str, Any]:
    """The row as the JSON document has it. Ratios are ours / theirs, in the row's unit; the peer is the best one.

    A row holds when its own gate and those of its peers do; None: it has none, or ours is absent.
    """
    ours, absent = values.get("ours", []), row.ours if isinstance(row.ours, str) else None
    ratios = _ratios(ours, values["limit"])
    peers = [_peer(row, name, ours, values) for name in row.peers]
    present = [peer for peer in peers if "value" in peer]
    best = sorted(present, key=lambda peer: float(peer["value"]), reverse=row.better == "more")[0] if present else {}
    ratio = _median(ratios)
    own = _holds(row, row.gate, _median(ours) if row.absolute else ratio)
    held = [holds for holds in (own, *(peer["holds"] for peer in peers)) if holds is not None]
    return {
        "id": row.id,
        "what": row.what,
        "unit": row.unit,
        "better": row.better,
        "ours": _median(ours),
        "absent": absent,
        "limit": statistics.median(values["limit"]),
        "limit_is": row.limit_is,
        "peer": best.get("peer"),
        "peer_value": best.get("value"),
        "ratio_limit": ratio,
        "ratio_peer": best.get("ratio"),
        "spread": spread(ratios) if ratios else None,
        "gate": row.gate,
        "absolute": row.absolute,
        "gate_holds": own,
        "holds": all(held) if held else None,
        "peers": peers,
    }


def _peer(row: Row, name: str, ours: Sequence[float], values: dict[str, list[float]]) -> dict[str, Any]:
    """What one of them did, or why it is absent; whether its gate holds, if it has one."""
    peer, gate = row.peers[name], row.peer_gates.get(name)
    if isinstance(peer, str):
        return {"peer": name, "absent": peer, "gate": gate, "holds": None}
    against = _median(_ratios(ours, values[name]))
    value = statistics.median(values[name])
    return {"peer": name, "value": value, "ratio": against, "gate": gate, "holds": _holds(row, gate, against)}


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Of each round; none where ours is absent."""
    return [a / b for a, b in zip(ours, theirs, strict=True)] if ours else []


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _holds(row: Row, gate: float | None, value: float | None) -> bool | None:
    return None if gate is None or value is None else value >= gate if row.better == "more" else value <= gate


def spread(values: Sequence[float]) -> float:
    """(p90 - p10) / median."""
    ordered = sorted(values)
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9)]
    return (at[1] - at[0]) / statistics.median(ordered)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


# ---- the table


def short(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def table(results: Sequence[dict[str, Any]]) -> str:
    """For people: a line for each row, and one for each further peer."""
    lines = [("id", "what", "unit", "ours", "limit", "x limit", "spread", "peer", "value", "x peer", "")]
    for row in results:
        best, others = row["peer"] or "-", [peer for peer in row["peers"] if peer["peer"] != row["peer"]]
        figures = [short(row[key]) for key in ("ours", "limit", "ratio_limit")]
        peer = (best, short(row["peer_value"]), short(row["ratio_peer"]))
        spreads = "-" if row["spread"] is None else f"{row['spread']:.0%}"
        lines.append((row["id"], row["what"], row["unit"], *figures, spreads, *peer, row["absent"] or _gates(row)))
        for other in others:
            told = other.get("absent", short(other.get("value")))
            gate = "" if other["gate"] is None else _gate(other["gate"], other["holds"], " x peer")
            lines.append(("", "", "", "", "", "", "", other["peer"], told, short(other.get("ratio")), gate))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _gates(row: dict[str, Any]) -> str:
    """The row's own and that of its best peer, which is on the same line."""
    own = (row["gate"], row["gate_holds"], f" {row['unit']}" if row["absolute"] else " x limit")
    peers = [(peer["gate"], peer["holds"], " x peer") for peer in row["peers"] if peer["peer"] == row["peer"]]
    return ", ".join(_gate(*gate) for gate in (own, *peers) if gate[0] is not None)


def _gate(gate: float, holds: bool | None, of: str) -> str:
    return f"{'GATE MISSED' if holds is False else 'gate'} {gate:g}{of}"
