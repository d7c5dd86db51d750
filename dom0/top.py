"""`ring1 top`: the host's view of each process (psutil) beside the hypervisor's of each domain.

Memory is proportional (PSS), read by the hypervisor through a descriptor that each process opened on itself before it was
locked: a monitor shares its domain's space and is counted with it. Rates are per second since the table before.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.live import Live
from rich.table import Table

from dom0.client import Connection
from hypervisor.public.io.stats import StatsKind
from hypervisor.public.types import PAGE_SIZE

FIRST_SECONDS = 0.25  # rates of the first table are over so much
COUNTERS = ("hypercalls", "events_sent", "events_delivered", "events_elided")
BYTES = ("rd_bytes", "wr_bytes", "tx_bytes", "rx_bytes")


class Sampler:
    """Samples of one host; rates are differences between two of them."""

    def __init__(self, host: Connection) -> None:
        self._host = host
        self._processes: dict[int, psutil.Process] = {}
        self._before: dict[str, dict[str, Any]] = {}
        self._at = 0.0

    def sample(self) -> dict[str, Any]:
        """One table, as `--json` prints it."""
        stats, now = self._host.ask("stats"), time.monotonic()
        rows = [self._process_row(name, pid) for name, pid in stats["processes"].items()]
        rows[0]["pss_kib"] = stats["hypervisor_pss_kib"]
        rows += [self._domain_row(domain) for domain in stats["domains"] if domain["pid"]]
        elapsed = now - self._at if self._before else 0.0
        for row in rows:
            self._rates(row, self._before.get(row["name"]), elapsed)
        self._before, self._at = {row["name"]: row for row in rows}, now
        host = {key: value for key, value in stats["host"].items() if key.startswith("frames_")}
        return {"host": host | {"page_bytes": PAGE_SIZE}, "seconds": round(elapsed, 3), "rows": rows}

    def _process_row(self, name: str, pid: int) -> dict[str, Any]:
        row: dict[str, Any] = {"name": name, "pid": pid, "pss_kib": None}
        process = self._processes.setdefault(pid, psutil.Process(pid)) if psutil.pid_exists(pid) else None
        try:
            assert process is not None
            times = process.cpu_times()
            row |= {"cpu_s": times.user + times.system, "rss_kib": process.memory_info().rss >> 10}
            row["faults"], row["major_faults"] = _faults(pid)
        except (AssertionError, psutil.NoSuchProcess, OSError):
            row |= {"cpu_s": 0.0, "rss_kib": 0, "faults": 0, "major_faults": 0}  # it ended this very moment
        return row

    def _domain_row(self, domain: dict[str, Any]) -> dict[str, Any]:
        row = self._process_row(domain["name"], domain["pid"])
        row |= {"domid": domain["domid"], "state": domain["state"], "pss_kib": domain["pss_kib"]}
        row |= {"cpu_s": domain["cpu_ns"] / 1e9, "memory_kib": domain["frames"] * PAGE_SIZE >> 10}
        row["maxmem_kib"] = domain["max_frames"] * PAGE_SIZE >> 10
        row |= {key: domain[key] for key in COUNTERS}
        paging = domain["paging"] or {}
        row["page_tables"] = sum(paging.get(kind, 0) for kind in ("l1", "l2", "l3"))
        row["pages_mapped"] = paging.get("mapped", 0)
        row |= {f"guest_{key}": paging.get(key, 0) for key in ("faults", "fills", "bounces")}
        devices = domain["devices"]
        row |= {key: sum(device.get(key, 0) for device in devices) for key in BYTES}
        row["ring_batches"] = sum(device["batches"] for device in devices)
        row["ring_requests"] = sum(device.get("requests", 0) + device.get("tx_packets", 0) for device in devices)
        row["ring_occupancy"] = max((d["occupancy"] for d in devices if d["kind"] == StatsKind.VBD), default=0)
        row["packets_dropped"] = sum(device.get("dropped", 0) for device in devices)
        return row

    def _rates(self, row: dict[str, Any], before: dict[str, Any] | None, elapsed: float) -> None:
        same = before is not None and before["pid"] == row["pid"] and elapsed > 0
        for key in ("cpu_s", "faults", *COUNTERS[:2], *BYTES):
            if key in row:
                rate = (row[key] - before[key]) / elapsed if same and before is not None else 0.0
                row["cpu_percent" if key == "cpu_s" else f"{key}_per_s"] = round(rate * (100 if key == "cpu_s" else 1), 1)


def _faults(pid: int) -> tuple[int, int]:
    """Minor and major page faults so far (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[7]), int(fields[9])


def table(sample: dict[str, Any]) -> Table:
    """For people."""
    host = sample["host"]
    total, free = host["frames_total"] * PAGE_SIZE >> 20, host["frames_free"] * PAGE_SIZE >> 20
    out = Table(title=f"machine memory {total} MiB, {free} free, {host['frames_shared']} frames shared", box=None)
    names = "NAME ID STATE CPU% MEM/max-MiB PSS-MiB TABLES MAPPED FAULTS/s HYPERCALLS/s EVENTS/s ELIDED% DISK-rd/wr-MB/s"
    names += " NET-tx/rx-MB/s BATCH RING DROPS"
    for name in names.split():
        out.add_column(name, justify="left" if name in ("NAME", "STATE") else "right")
    for row in sample["rows"]:
        domain = "domid" in row
        cells = [row["name"], str(row.get("domid", "")), row.get("state", "")]
        memory = f"{row['memory_kib'] / 1024:.1f}/{row['maxmem_kib'] / 1024:.1f}" if domain else ""
        cells += [f"{row['cpu_percent']:.1f}", memory, f"{row['pss_kib'] / 1024:.1f}" if row["pss_kib"] is not None else "?"]
        cells += [str(row["page_tables"]), str(row["pages_mapped"])] if domain else ["", ""]
        cells.append(f"{row['faults_per_s']:.0f}")
        if domain:
            batch = row["ring_requests"] / row["ring_batches"] if row["ring_batches"] else 0.0
            delivered, elided = row["events_delivered"], row["events_elided"]
            cells += [f"{row['hypercalls_per_s']:.0f}", f"{row['events_sent_per_s']:.0f}"]
            cells.append(f"{100 * elided / (delivered + elided):.0f}" if delivered + elided else "")
            cells.append(f"{row['rd_bytes_per_s'] / 1e6:.1f}/{row['wr_bytes_per_s'] / 1e6:.1f}")
            cells.append(f"{row['tx_bytes_per_s'] / 1e6:.1f}/{row['rx_bytes_per_s'] / 1e6:.1f}")
            cells += [f"{batch:.1f}", str(row["ring_occupancy"]), str(row["packets_dropped"])]
        out.add_row(*cells)
    return out


def run(once: bool, delay: float, as_json: bool) -> None:
    """Until interrupted, or once. Raises HostError."""
    with Connection() as host:
        sampler = Sampler(host)
        sampler.sample()
        time.sleep(FIRST_SECONDS)
        sample = sampler.sample()
        if once or not sys.stdout.isatty():
            _print(sample, as_json)
            return
        try:
            with Live(table(sample), auto_refresh=False, screen=True) as screen:
                while True:
                    time.sleep(delay)
                    screen.update(table(sampler.sample()), refresh=True)
        except KeyboardInterrupt:
            pass


def _print(sample: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(sample, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(table(sample))
