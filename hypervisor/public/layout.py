"""Where everything lies in a kernel's process, once: guest-virtual addresses and the window that shows them.

    guest va                       host address = KERNEL_WINDOW + va
    0x00_0000_0000  unmapped: a null pointer faults
    0x00_0010_0000  VIRT_BASE: the reservation at start, pfn p at VIRT_BASE + p * 4096
    0x40_0000_0000  GRANT_BASE: where a domain maps what others granted to it (its own choice within this half)
    0x7F_FC00_0000  HYPERVISOR_VIRT_START: the top 64 MB, the hypervisor's: monitor code, command pages
    0x7F_FC00_4000  TRAP_TABLE: which handlers the entry code may enter, read-only
    0x7F_FC10_0000  M2P: u64 pfn of every machine frame, read-only
    0x7F_FFFF_F000  shared_info, read-write, the last page of the space

This is the space that a domain starts in: window 0, where its kernel's code and stack lie for good. Each further root that
it loads as its base pointer is shown in a window of its own, 512 GiB each, side by side. Where a hypercall takes the
address of something in memory, it is an offset from KERNEL_WINDOW, whatever the current space is: va + (window << 39).

The first pfns of a domain are fixed: the builder fills them, the hypervisor never reads them except the grant table.
"""

from __future__ import annotations

from hypervisor.public.types import PAGE_SIZE

SPACE_BYTES = 1 << 39
KERNEL_WINDOW = 0x2000_0000_0000  # 0x1000_0000_0000 is taken by sanitizers
NR_WINDOWS = 16
HYPERVISOR_VIRT_START = SPACE_BYTES - (64 << 20)

MONITOR_CODE = HYPERVISOR_VIRT_START
COMMANDS = HYPERVISOR_VIRT_START + PAGE_SIZE
COMMAND_PAGES = 4  # commands, the table of answers, filter programs, the trap table
TRAP_TABLE = COMMANDS + 3 * PAGE_SIZE  # traps.TRAPS: read by the entry code, written by the hypervisor
M2P = HYPERVISOR_VIRT_START + (1 << 20)
M2P_BYTES = 62 << 20  # at most: 8,126,464 frames, 31 GiB
SHARED_INFO = SPACE_BYTES - PAGE_SIZE

VIRT_BASE = 0x10_0000
GRANT_BASE = 0x40_0000_0000

SHARED_INFO_PFN = 0
START_INFO_PFN = 1
STORE_PFN = 2
CONSOLE_PFN = 3
GRANT_PFN = 4
GRANT_FRAMES = 8
GRANT_ENTRIES = GRANT_FRAMES * PAGE_SIZE // 8
KERNEL_PFN = GRANT_PFN + GRANT_FRAMES

# descriptors of a domain's process, fixed before it is locked; nothing else is open then
FD_REQUEST = 8  # hypercalls out, POSIX queue
FD_REPLY = 9  # replies in, POSIX queue
FD_UPCALL = 10  # signalfd of the upcall signal
FD_DESCRIPTORS = 11  # dom0 and driver domains only: SEQPACKET, descriptors in
FD_FAULT = 12  # page faults, SEQPACKET: the entry code's alone


def virt(pfn: int) -> int:
    """Guest-virtual address of a pseudo-physical frame in the boot mapping."""
    return VIRT_BASE + pfn * PAGE_SIZE


def in_windows(address: int) -> bool:
    """Whether a host address lies in one of the windows."""
    return 0 <= address - KERNEL_WINDOW < NR_WINDOWS * SPACE_BYTES


def is_hypervisors(address: int) -> bool:
    """Whether a host address lies in the top 64 MB of a window."""
    return in_windows(address) and (address - KERNEL_WINDOW) % SPACE_BYTES >= HYPERVISOR_VIRT_START


def host(va: int) -> int:
    """Host address at which a kernel's process sees guest-virtual address `va`."""
    return KERNEL_WINDOW + va
