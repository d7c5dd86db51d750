"""The demonstration: a host of its own, alice and bob, a real file from one disk to the other, and what it cost.

    alice's disk (read-only FILE) -> blkback -> alice -> her vif -> netback, firewall -> his vif -> bob -> blkback -> his disk

A second interface of alice's is refused by the rules. dom0 compares the digests. Nothing is left when it returns.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from dom0 import client
from dom0.client import Connection, HostError
from hypervisor.public.io.blkif import SECTOR

PROGRAMS = Path(__file__).parent / "programs"
AT_LEAST, ENOUGH = 32_000_000, 40 << 20  # bytes of the default file
SECONDS = 120.0  # the transfer may take
LOOK_SECONDS = 0.1
RULES = """\
default drop
drop   any in alice/1                                                                   # her second interface: nothing
accept udp from 10.0.0.1 port 7000 to 10.0.0.2 port 7000 in alice/0 out bob/0
accept udp from 10.0.0.2 port 7000 to 10.0.0.1 port 7000 in bob/0 out alice/0
"""

screen = Console(stderr=True)


def run(file: Path | None, as_json: bool) -> int:
    """Returns the exit code: 0 where bob has what alice had."""
    with _work() as work:
        source, what = (_padded(file, work), str(file)) if file else _default_file(work)
        size = file.stat().st_size if file else source.stat().st_size
        screen.print(f"[bold]file[/]    {what}, {size:,} bytes")
        with _host(work / "state"):
            report = _transfer(work, source, size)
        report["same_digest"] = report["sha256"] == _digest(source, size)
        report["left_over"] = _left_over(work / "state", report.pop("pids"))
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0 if report["same_digest"] and not report["left_over"] else 1


# ---- what is sent


def _default_file(work: Path) -> tuple[Path, str]:
    """Files that are on every machine where this runs: the interpreter, then its packages, then its library, one after
    the other until it is enough."""
    image = work / "python.img"
    folders = [Path(sysconfig.get_path(name)) for name in ("platlib", "stdlib")]
    files = [Path(sys.executable).resolve(), *(f for folder in folders for f in sorted(folder.rglob("*")) if f.is_file())]
    count = 0
    with image.open("wb") as out:
        for path in files:
            if out.tell() >= ENOUGH:
                break
            with path.open("rb") as part:
                shutil.copyfileobj(part, out)
            count += 1
        out.write(bytes(-out.tell() % SECTOR))
        if out.tell() < AT_LEAST:
            raise HostError(f"Python's files are only {out.tell()} bytes here; name a FILE")
    return image, f"the Python interpreter and {count - 1} files of its packages and library, concatenated"


def _padded(file: Path, work: Path) -> Path:
    """The file itself, or a copy where it does not end with a sector."""
    if not file.is_file() or not file.stat().st_size:
        raise HostError(f"{file} is not a file with something in it")
    if file.stat().st_size % SECTOR == 0:
        return file.absolute()
    copy = work / "file.img"
    shutil.copyfile(file, copy)
    os.truncate(copy, -(-copy.stat().st_size // SECTOR) * SECTOR)
    return copy


def _digest(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (part := file.read(min(size, 1 << 20))):
            digest.update(part)
            size -= len(part)
    return digest.hexdigest()


# ---- the host and the two domains


@contextmanager
def _work() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ring1-demo-") as folder:
        yield Path(folder)


@contextmanager
def _host(state: Path) -> Iterator[None]:
    began = time.monotonic()
    pid = client.up(state)
    screen.print(f"[bold]host[/]    hypervisor {pid}, dom0 and two driver domains up in {time.monotonic() - began:.2f} s")
    try:
        yield
    finally:
        client.down(state)


def _transfer(work: Path, source: Path, size: int) -> dict[str, Any]:
    target = work / "bob.img"
    with target.open("wb") as image:
        image.truncate(-(-size // SECTOR) * SECTOR)
    alice = {
        "name": "alice", "kernel": str(PROGRAMS / "alice.py"), "memory": 16, "cmdline": f"size={size} to=10.0.0.2",
        "disk": [{"name": "xvda", "image": str(source), "mode": "r"}], "vif": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.9"}],
    }  # fmt: skip
    bob = {
        "name": "bob", "kernel": str(PROGRAMS / "bob.py"), "memory": 16, "cmdline": f"size={size}",
        "disk": [{"name": "xvda", "image": str(target), "mode": "w"}], "vif": [{"ip": "10.0.0.2"}],
    }  # fmt: skip
    with Connection(work / "state") as host:
        host.ask("firewall-set", text=RULES)
        for config in (bob, alice):
            began = time.monotonic()
            made = host.ask("create", tree=config)
            took = (time.monotonic() - began) * 1e3
            screen.print(f"[bold]{config['name']:<7}[/] domain {made['domid']}, created in {took:.1f} ms")
        result = _watch(host, size)
        report = _account(host, size, result)
        for name in ("alice", "bob"):
            host.ask("shutdown", name=name)
        report["sha256"] = host.ask("digest", path=str(target), size=size)
    return report


def _watch(host: Connection, size: int) -> dict[str, str]:
    """Show how far bob is, until alice says that he has it all; her own words on it."""
    bar = Progress(
        TextColumn("[bold]{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=screen
    )
    end = time.monotonic() + SECONDS
    with bar:
        task = bar.add_task("sending", total=size)
        while time.monotonic() < end:
            stats = {d["name"]: d for d in host.ask("stats")["domains"]}
            for name in ("alice", "bob"):
                if stats.get(name, {}).get("state") != "running":
                    raise HostError(f"{name} ended: {host.ask('info', name=name)['reason']}")
            bar.update(task, completed=sum(d.get("wr_bytes", 0) for d in stats["bob"]["devices"]))
            if said := host.ask("store-read", path=f"/local/domain/{stats['alice']['domid']}/data/result"):
                return dict(word.split("=", 1) for word in said.split())
            time.sleep(LOOK_SECONDS)
    raise HostError(f"the transfer did not end within {SECONDS:g} s")


def _account(host: Connection, size: int, result: dict[str, str]) -> dict[str, Any]:
    """Every figure, before the two end."""
    stats, rules = host.ask("stats"), host.ask("firewall-list")
    domains = stats["domains"]
    devices = [device for domain in domains for device in domain["devices"]]
    processes = [{"name": "hypervisor", "pid": stats["processes"]["hypervisor"], "pss_kib": stats["hypervisor_pss_kib"]}]
    processes += [{"name": d["name"], "pid": d["pid"], "pss_kib": d["pss_kib"], "cpu_s": d["cpu_ns"] / 1e9} for d in domains]
    for process in processes:
        if "cpu_s" not in process:
            times = psutil.Process(process["pid"]).cpu_times()
            process["cpu_s"] = times.user + times.system
    seconds = float(result["seconds"])
    return {
        "bytes": size,
        "seconds": seconds,
        "mb_per_s": size / 1e6 / seconds,
        "hypercalls": sum(d["hypercalls"] for d in domains),
        "events_sent": sum(d["events_sent"] for d in domains),
        "events_signalled": sum(d["events_delivered"] for d in domains),
        "events_elided": sum(d["events_elided"] for d in domains),
        "ring_batches": sum(d["batches"] for d in devices),
        "ring_requests": sum(d.get("requests", 0) + d.get("tx_packets", 0) for d in devices),
        "packets_accepted": sum(hits for rule, hits in rules["rules"] if rule.startswith("accept")),
        "packets_dropped": sum(hits for rule, hits in rules["rules"] if rule.startswith("drop")) + rules["default"],
        "datagrams_repeated": int(result["repeated"]),
        "processes": processes,
        "pids": [p["pid"] for p in processes],
    }


def _left_over(state: Path, pids: list[int]) -> list[str]:
    """Processes that live on, and objects that the host named in its journal and did not remove."""
    left = [f"process {pid}" for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    return left + [path.name for path in (state / "control", state / "journal") if path.exists()]


# ---- the table


def _print(report: dict[str, Any]) -> None:
    out = Console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    accepted, dropped = report["packets_accepted"], report["packets_dropped"]
    for name, value in [
        ("bytes", f"{report['bytes']:,} in {report['seconds']:.2f} s"),
        ("MB/s", f"{report['mb_per_s']:.1f}"),
        ("hypercalls", f"{report['hypercalls']:,}"),
        ("events", f"{report['events_sent']:,} sent, {report['events_elided']:,} elided (no signal needed)"),
        ("ring batches", f"{report['ring_batches']:,} for {report['ring_requests']:,} requests"),
        ("packets", f"{accepted:,} accepted, {dropped:,} dropped by the firewall, {report['datagrams_repeated']:,} repeated"),
        ("sha256", report["sha256"]),
    ]:
        table.add_row(name, value)
    for process in report["processes"]:
        pss = f"{process['pss_kib'] / 1024:.1f} MiB" if process["pss_kib"] is not None else "?"
        table.add_row(process["name"], f"{process['cpu_s']:.2f} s CPU, {pss} PSS")
    out.print(table)
    out.print("[bold green]same digest[/]" if report["same_digest"] else "[bold red]DIGESTS DIFFER[/]")
    left = report["left_over"]
    out.print(f"left over: {', '.join(left) if left else 'nothing'}")
