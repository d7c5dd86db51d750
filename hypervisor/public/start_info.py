"""Start of day: what a domain finds in its frame START_INFO_PFN, and the page it shares with the hypervisor for life.

start_info follows xen/include/public/xen.h to offset 1168; ring1's own part begins at 2048. All little-endian, written
by the builder [DOM0], read once by the guest.

shared_info (xen.h, x86-64, 3136 bytes), who writes:
    0     vcpu_info[0]: u8 upcall_pending [HV sets, DOM clears], u8 upcall_mask [DOM], u64 @8 pending_sel [HV sets, DOM takes],
          u64 @16 cr2 [HV], @32 vcpu_time_info (32 bytes): not filled in this version
    2048  u64 evtchn_pending[64]  [HV sets, DOM clears]
    2560  u64 evtchn_mask[64]     [DOM; HV by unmask]
    3072  u32 wc_version, u32 wc_sec, u32 wc_nsec, u32 wc_sec_hi: not filled in this version
    3136  u64 window [HV]: host address of guest-virtual 0 in the current space
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hypervisor.public.types import PAGE_SIZE

MAGIC = b"ring1-0.1-x86_64"
CMDLINE_BYTES = 1024
EXTENSION = 2048

SHARED_UPCALL_PENDING = 0
SHARED_UPCALL_MASK = 1
SHARED_PENDING_SEL = 8
SHARED_CR2 = 16
SHARED_TIME = 32
SHARED_PENDING = 2048
SHARED_MASK = 2560
SHARED_WALLCLOCK = 3072
SHARED_WINDOW = 3136  # after Xen's part

SIF_PRIVILEGED = 1  # dom0
SIF_INITDOMAIN = 2

_XEN = struct.Struct("<32sQQIxxxxQIxxxxQIxxxxQQQQQ1024sQQ")
_OWN = struct.Struct("<QQIiiiiIQQQI4x64s64sQ")
assert _XEN.size == 1168


@dataclass(frozen=True)
class StartInfo:
    """A domain's start_info. Addresses are guest-virtual; frame numbers are the domain's own pfns."""

    nr_pages: int
    flags: int
    store_pfn: int
    store_evtchn: int
    console_pfn: int
    console_evtchn: int
    mod_start: int  # the kernel image (Python source, or 0 for a native kernel): first byte
    mod_len: int
    cmdline: str
    domid: int
    name: str
    virt_base: int
    window: int  # host address of guest-virtual 0
    shared_info: int
    request_mqd: int
    reply_mqd: int
    upcall_fd: int
    descriptors_fd: int
    boot_ns: int  # CLOCK_MONOTONIC at which the hypervisor booted: system time 0
    grant_table: int
    nr_grant_entries: int
    entry: str  # the module a driver domain or dom0 runs, "" for a delivered image
    pt_base: int = 0  # the boot page tables, guest-virtual: the root first; what follows them is free
    nr_pt_frames: int = 0
    mfn_list: int = 0  # u64 mfn of every pfn, guest-virtual; INVALID_PFN from nr_pages to max_pages
    max_pages: int = 0  # pfns that the boot page tables and mfn_list have room for

    def pack(self) -> bytes:
        """One page."""
        page = bytearray(PAGE_SIZE)
        _XEN.pack_into(
            page, 0, MAGIC, self.nr_pages, self.shared_info, self.flags, self.store_pfn, self.store_evtchn, self.console_pfn,
            self.console_evtchn, self.pt_base, self.nr_pt_frames, self.mfn_list, self.mod_start, self.mod_len,
            self.cmdline.encode()[: CMDLINE_BYTES - 1], 0, 0,
        )  # fmt: skip
        _OWN.pack_into(
            page, EXTENSION, self.virt_base, self.window, self.domid, self.request_mqd, self.reply_mqd, self.upcall_fd,
            self.descriptors_fd, 0, self.boot_ns, self.grant_table, self.shared_info, self.nr_grant_entries,
            self.name.encode()[:63], self.entry.encode()[:63], self.max_pages,
        )  # fmt: skip
        return bytes(page)

    @classmethod
    def unpack(cls, page: bytes) -> StartInfo:
        """From a copy of the page. Raises ValueError for another magic."""
        magic, nr, shared, flags, store, sport, cons, cport, pt, npt, p2m, mod, length, cmd, _, _ = _XEN.unpack_from(page)
        if magic.rstrip(b"\0") != MAGIC:
            raise ValueError(f"start_info: magic {magic!r}")
        own = _OWN.unpack_from(page, EXTENSION)
        base, window, domid, rq, rp, up, desc, _, boot, grants, _, entries, name, entry, room = own
        return cls(
            nr, flags, store, sport, cons, cport, mod, length, _text(cmd), domid, _text(name), base, window, shared, rq, rp, up,
            desc, boot, grants, entries, _text(entry), pt, npt, p2m, room,
        )  # fmt: skip


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode()
