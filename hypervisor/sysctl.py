"""Host-wide questions of dom0, answered into its memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgpack

from hypervisor import domctl, guest_access
from hypervisor._hv import ffi, lib
from hypervisor.dispatch import hypercall
from hypervisor.domain import Domain
from hypervisor.frames import NO_MFN
from hypervisor.public import sysctl as abi
from hypervisor.public.errors import NoEntry, TooBig
from hypervisor.public.mmu import PageType
from hypervisor.public.types import DOMID_FIRST_RESERVED, DOMID_SELF, PAGE_SIZE

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor

REASON_CHARS = 400  # in the list, which is no message: a crash's whole sentence


def _answer(hv: Hypervisor, caller: Domain, call: Any, data: bytes) -> int:
    if len(data) > call.size:
        raise TooBig(f"{len(data)} bytes, there is room for {call.size}")
    guest_access.copy_out(hv, caller, call.address, data)
    return len(data)


@hypercall(abi.ReadConsole)
def read_console(hv: Hypervisor, caller: Domain, call: abi.ReadConsole) -> int:
    return _answer(hv, caller, call, hv.log_text().encode()[-call.size :] if call.size else b"")


@hypercall(abi.PhysInfo)
def physinfo(hv: Hypervisor, caller: Domain, call: abi.PhysInfo) -> int:
    facts = {
        **frame_counts(hv), "page_bytes": PAGE_SIZE, "nr_domains": sum(d.alive for d in hv.domains.values()),
        "isolation": hv.isolation, "layers": hv.layers, "own_uids": hv.own_uids, "boot_ns": hv.boot_ns, "pid": os.getpid(),
        "scheduler": "bvt", "cpus": sorted(hv.scheduler.cpus),
        "zygote_pid": hv.zygote.pid,
    }  # fmt: skip
    return _answer(hv, caller, call, msgpack.packb(facts))


def frame_counts(hv: Hypervisor) -> dict[str, int]:
    """Frames of the machine: total = free + owned; shared ones are mapped by another domain than their owner."""
    shared = {m.mfn for d in hv.domains.values() for group in d.active.values() for m in group}
    total, free = hv.frames.nr_frames, hv.frames.nr_free
    return {"frames_total": total, "frames_free": free, "frames_owned": total - free, "frames_shared": len(shared)}


def paging(hv: Hypervisor) -> list[dict[str, Any]]:
    """What each living domain uses its frames as, what is mapped of its tables, and its page faults."""
    counts: Any = ffi.new("uint32_t[][8]", DOMID_FIRST_RESERVED)
    lib.frame_census(hv.frames.mmu, counts, DOMID_FIRST_RESERVED)
    kinds = [(kind.name.lower(), int(kind)) for kind in PageType] + [("mapped", lib.FRAME_MAPPED)]
    return [
        {
            "domain": d.name,
            **{name: counts[domid][kind] for name, kind in kinds},
            "windows": sum(root != NO_MFN for root in d.space.windows),
            "faults": d.faults, "fills": d.fills, "bounces": d.bounces,
        }
        for domid, d in sorted(hv.domains.items()) if d.state != "dead"
    ]  # fmt: skip


@hypercall(abi.GetDomainInfoList)
def info_list(hv: Hypervisor, caller: Domain, call: abi.GetDomainInfoList) -> int:
    rows = [list(domctl.info(hv, d)._replace(reason=d.reason[:REASON_CHARS])) for _, d in sorted(hv.domains.items())]
    return _answer(hv, caller, call, msgpack.packb(rows))


@hypercall(abi.Ledger)
def ledger(hv: Hypervisor, caller: Domain, call: abi.Ledger) -> int:
    live = [d for d in hv.domains.values() if d.state != "dead"]
    book = {
        "shm": [{"name": hv.machine.name, "bytes": hv.machine.nr_frames * PAGE_SIZE, "linked": False}],
        "queues": [{"domain": d.name, "fds": [q.mqd for q in d.queues]} for d in live if d.queues],
        "sockets": [{"domain": d.name, "fd": d.monitor.sock.fileno()} for d in live if d.monitor],
        "processes": hv.children.live(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "grants": sum(len(d.maptrack) for d in live),
        "ports": sum(len(d.ports) for d in live),
        "domains": [d.name for d in live],
        "paging": paging(hv),
        **frame_counts(hv),
    }
    return _answer(hv, caller, call, msgpack.packb(book))


@hypercall(abi.ProcessMemory)
def process_memory(hv: Hypervisor, caller: Domain, call: abi.ProcessMemory) -> int:
    fd = hv.smaps_fd if call.domid == DOMID_SELF else hv.lookup(call.domid).smaps_fd
    if fd < 0:
        raise NoEntry("no descriptor of its smaps_rollup")
    try:
        text = os.pread(fd, 4096, 0)
    except OSError as error:
        raise NoEntry(f"smaps_rollup: {error}") from None
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(b"Pss:")), 0)
