"""python tests/native/machine.py STATE JOBS: a hypervisor whose domains are native kernels, one after another, without a dom0.

The real gate, zygote, monitors and hypercalls; only the builder's part is done here, by the hypervisor's own hand, from
ABI.md section 3. JOBS is a JSON list of jobs; the last line of output is a JSON list of their ends.

    job   {"kernel": path of an ELF file, "cmdline": text, "unfiltered": bool, "ring_may_leave": bool}
    end   {"exit_code": int, "reason": text, "console": text, "said": [lines of console_io]}

Domain 1, paused for ever, grants its frame KERNEL_PFN read-only to every job's domain in turn, as its entry 8, and waits
for a frame from it, entry 9. `unfiltered` and `ring_may_leave` are seeded defects; the second stays for the jobs after it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dom0 import elf
from hypervisor import domctl, evtchn, lifecycle, mmu
from hypervisor.core import Hypervisor
from hypervisor.domain import DOM0, Domain
from hypervisor.host import Host
from hypervisor.loop import Steps, run_task
from hypervisor.public.boot_tables import BootTables, boot_tables
from hypervisor.public.domctl import CreateFlags, LaunchInfo, UnpauseDomain
from hypervisor.public.evtchn import AllocUnbound
from hypervisor.public.grant import ENTRY, NR_RESERVED_ENTRIES, Gtf
from hypervisor.public.io import console
from hypervisor.public.layout import (
    CONSOLE_PFN,
    FD_REPLY,
    FD_REQUEST,
    FD_UPCALL,
    GRANT_ENTRIES,
    GRANT_PFN,
    KERNEL_PFN,
    KERNEL_WINDOW,
    SHARED_INFO,
    START_INFO_PFN,
    STORE_PFN,
    VIRT_BASE,
    virt,
)
from hypervisor.public.mmu import PageType
from hypervisor.public.start_info import StartInfo
from hypervisor.public.types import PAGE_SIZE

FRAMES = 64
GRANTER = 1
GRANTED = 0x600D
GRANT_REF, TRANSFER_REF = NR_RESERVED_ENTRIES, NR_RESERVED_ENTRIES + 1


class Machine:
    def __init__(self, state: Path) -> None:
        self.hv = hv = Hypervisor(Host(state), 1024)
        self.dom0 = Domain(DOM0, "dom0", CreateFlags.DEBUG)  # a record, no process: somebody whose events may be lost
        hv.domains[DOM0] = self.dom0
        hv.host.drop_privileges()
        self.granter = Domain(GRANTER, "granter", CreateFlags.NONE)
        self.until_done(lifecycle.create(hv, self.granter, KERNEL_PFN + 1, ""))
        self.granter.max_frames += 8  # room for what is given to it
        hv.machine.write(self.granter.mfn_list[KERNEL_PFN], 0, struct.pack("<Q", GRANTED))

    def until_done(self, steps: Steps, each_turn: Callable[[], None] = lambda: None) -> None:
        """Turn the loop until a continuation has ended. Raises what it raised."""
        ended: list[BaseException | None] = []

        def done(_: Any, error: BaseException | None) -> None:
            ended.append(error)
            self.hv.loop.soon(lambda: None)  # this turn does not wait for a descriptor any more

        run_task(steps, done)
        while not ended:
            each_turn()
            self.hv.loop.step()
        if ended[0] is not None:
            raise ended[0]

    def run(self, domid: int, job: dict[str, Any]) -> dict[str, Any]:
        """The life of one domain."""
        hv, flags = self.hv, CreateFlags.NATIVE | (CreateFlags.UNFILTERED if job["unfiltered"] else CreateFlags.NONE)
        domain = Domain(domid, f"native{domid}", flags)
        self.until_done(lifecycle.create(hv, domain, FRAMES, ""))
        image = elf.parse(Path(job["kernel"]).read_bytes())
        for segment in image.segments:
            for i in range(0, len(segment.data), PAGE_SIZE):
                hv.machine.write(domain.mfn_list[segment.pfn + i // PAGE_SIZE], 0, segment.data[i : i + PAGE_SIZE])
        port = evtchn.alloc_unbound(hv, self.dom0, AllocUnbound(domid, DOM0))  # of the console; dom0 never binds it
        tables = boot_tables(image.end_pfn, FRAMES)
        hv.machine.write(domain.mfn_list[START_INFO_PFN], 0, self.start_info(domain, port, job["cmdline"], tables).pack())
        granted = self.granter.mfn_list[KERNEL_PFN]
        entries = ENTRY.pack(Gtf.PERMIT_ACCESS | Gtf.READONLY, domid, granted) + ENTRY.pack(Gtf.ACCEPT_TRANSFER, domid, 0)
        hv.machine.write(self.granter.grant_frames[0], GRANT_REF * ENTRY.size, entries)
        if job.get("ring_may_leave"):
            hv.hold = lambda domain, mfn: None  # type: ignore[method-assign]
        self.load(domain, tables, range(image.text.pfn, image.text.pfn + image.text.pages))
        root = domain.mfn_list[tables.tables.start]
        self.until_done(domctl.launch_info(hv, self.dom0, LaunchInfo(domid, root, image.entry)))
        domctl.unpause(hv, self.dom0, UnpauseDomain(domid))
        page = b""

        def look() -> None:
            nonlocal page
            page = hv.machine.read(domain.mfn_list[CONSOLE_PFN], 0, PAGE_SIZE) if domain.alive else page

        def life() -> Steps:
            yield domain.dead

        self.until_done(life(), look)
        size = struct.unpack_from("<I", page, console.OUT_PROD)[0]
        said = re.findall(rf"\] \({domain.name}\) (.*)", hv.log_text())
        return {
            "exit_code": domain.exit_code,
            "reason": domain.reason,
            "console": page[console.OUT : console.OUT + size].decode(),
            "said": said,
        }

    def load(self, domain: Domain, tables: BootTables, text: range) -> None:
        """Its frame list and page tables; the root pinned."""
        packed = tables.pack(domain.mfn_list, text)
        for i in range(0, len(packed), PAGE_SIZE):
            mfn = domain.mfn_list[tables.mfn_list.start + i // PAGE_SIZE]
            self.hv.machine.write(mfn, 0, packed[i : i + PAGE_SIZE])
        self.until_done(mmu.pin(self.hv, domain, domain.mfn_list[tables.tables.start], PageType.L3))

    def start_info(self, domain: Domain, console_port: int, cmdline: str, tables: BootTables) -> StartInfo:
        return StartInfo(
            FRAMES, 0, STORE_PFN, 0, CONSOLE_PFN, console_port, 0, 0, cmdline, domain.domid, domain.name, VIRT_BASE,
            KERNEL_WINDOW, SHARED_INFO, FD_REQUEST, FD_REPLY, FD_UPCALL, -1, self.hv.boot_ns, virt(GRANT_PFN),
            GRANT_ENTRIES, "", virt(tables.tables.start), len(tables.tables), virt(tables.mfn_list.start), FRAMES,
        )  # fmt: skip

    def end(self) -> None:
        self.hv.frames.check()
        self.hv.zygote.stopping = True
        for pid in self.hv.children.live():
            os.kill(pid, signal.SIGKILL)
        while self.hv.children.live():
            self.hv.loop.step()


def main() -> None:
    machine = Machine(Path(sys.argv[1]))
    try:
        ends = [machine.run(GRANTER + 1 + i, job) for i, job in enumerate(json.loads(sys.argv[2]))]
    finally:
        machine.end()
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
