"""Host-wide questions of dom0, answered into the caller's memory as msgpack. Source: xen/include/public/sysctl.h."""

from __future__ import annotations

from hypervisor.public.hypercall import OP_SYSCTL, Hypercall
from hypervisor.public.types import U16, U32, U64


class ReadConsole(Hypercall[int]):
    """The log (`dmesg`) into `size` bytes at `address`; returns the length, the newest lines if it does not fit."""

    OP, CMD, PRIVILEGED = OP_SYSCTL, 1, True
    address: U64
    size: U32


class PhysInfo(Hypercall[int]):
    """msgpack map: frames total/free/owned/shared, page_bytes, nr_domains, isolation (list of lines), layers, uid mode,
    scheduler, cpus (those that domains are scheduled on)."""

    OP, CMD, PRIVILEGED = OP_SYSCTL, 3, True
    address: U64
    size: U32


class GetDomainInfoList(Hypercall[int]):
    """msgpack list of DomainInfo lists, by domid, the dead ones too, reasons in full. Returns the length.

    Raises TooBig, BadAddress.
    """

    OP, CMD, PRIVILEGED = OP_SYSCTL, 6, True
    address: U64
    size: U32


class Ledger(Hypercall[int]):
    """msgpack map of everything the hypervisor holds: shm, queues, sockets, processes, frames, grants, ports."""

    OP, CMD, PRIVILEGED = OP_SYSCTL, 1000, True
    address: U64
    size: U32


class ProcessMemory(Hypercall[int]):
    """Proportional set size in KiB of a domain's address space (its monitor shares it); DOMID_SELF: the hypervisor.

    Read through a descriptor the process opened on itself before it was locked. Raises NoSuchDomain, NoEntry.
    """

    OP, CMD, PRIVILEGED = OP_SYSCTL, 1001, True
    domid: U16
