"""python tests/native/paging_machine.py STATE JOBS: a hypervisor without a dom0, and kernels that attack it by page tables.

The real gate, zygote, monitors, fault path and hypercalls; the builder's part is done here, by the hypervisor's own hand. JOBS
is a JSON list of jobs; the last line of output is a JSON list of their ends.

    job   {"kernel": path of an ELF file, "cmdline": text, "defects": [names of paging_defects.py],
           "neighbour": whether a second kernel makes short calls meanwhile}
    end   {"exit_code": int, "reason": text, "said": [lines of console_io], "seen": [what was looked at], "lost": frames,
           "dirty": freed frames that are not zeros, "seconds": from the last wish to the end,
           "parked": how often it was made to wait since it had overdrawn its budget}

Beside the kernel stands a granter that never runs. It grants its page SECRET (and, to be read, READONLY) and its L1 table,
writable, and waits for a frame. A line that begins with "hypervisor: " is a wish of the kernel's (Machine.wishes).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from dom0 import elf
from hypervisor import budget, domctl, lifecycle, mmu
from hypervisor.core import Hypervisor
from hypervisor.domain import DOM0, Domain
from hypervisor.host import Host
from hypervisor.loop import Steps, run_task
from hypervisor.public.boot_tables import boot_tables
from hypervisor.public.domctl import CreateFlags, UnpauseDomain
from hypervisor.public.grant import ENTRY, NR_RESERVED_ENTRIES, Gtf
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
from tests.conftest import NIGHTLY, TIMEOUT
from tests.native import paging_hammer
from tests.native.paging_defects import DEFECTS

NR_FRAMES = 1024
FRAMES = 160
SECRET, READONLY = KERNEL_PFN, KERNEL_PFN + 1  # pfns of the granter's
SECRET_GREF, READONLY_GREF, TABLE_GREF, TAKER_GREF = range(NR_RESERVED_ENTRIES, NR_RESERVED_ENTRIES + 4)
WORD = 0x5EC12E7  # in the granter's pages
WISH = "hypervisor: "


def run(jobs: list[dict[str, Any]], state: Path) -> list[dict[str, Any]]:
    """How each job ended, in a machine of its own process."""
    state.chmod(0o700)
    done = subprocess.run(
        [sys.executable, "-m", "tests.native.paging_machine", str(state), json.dumps(jobs)],
        cwd=Path(__file__).resolve().parent.parent.parent, capture_output=True, text=True,
        timeout=TIMEOUT * (4 if NIGHTLY else 1), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return ends


class Machine:
    def __init__(self, state: Path) -> None:
        self.hv = hv = Hypervisor(Host(state), NR_FRAMES)
        hv.guest_log = self.heard  # type: ignore[method-assign]  # the log takes no more than so much a second
        hv.domains[DOM0] = self.dom0 = Domain(DOM0, "dom0", CreateFlags.DEBUG)  # a record, no process
        hv.host.drop_privileges()
        self.next_domid = 1
        self.granter: Domain | None = None
        self.said: list[str] = []
        self.seen: list[str] = []
        self.wished_ns = 0
        self.spoiled = False  # by a seeded defect: the counts are not what they should be
        self.wishes: dict[str, Callable[..., None]] = {
            "end-granter": lambda _: lifecycle.end(self.hv, self.the_granter, "the test's"),
            "counters": self.look_at_counters,
            "is-it-gone": self.look_whether_gone,
            "look-at-secret": self.look_at_secret,
            "monitor-killed": lambda domain: os.kill(domain.monitor_process.pid, signal.SIGKILL),
            "monitor-stopped": lambda domain: os.kill(domain.monitor_process.pid, signal.SIGSTOP),
            "monitor-killed-later": lambda domain: self.hv.start(paging_hammer.Hammer(self, domain, ()).kill_monitor()),
            "monitor-starved": self.starve_monitor,
            **{f"revoke-{how}": functools.partial(self.revoke, how) for how in paging_hammer.WISHES},
        }

    # ---- what kernels ask for

    def heard(self, domain: Domain, data: bytes) -> None:
        line = data.decode()
        if line.startswith(WISH):
            self.wished_ns = time.monotonic_ns()
            name, *numbers = line.removeprefix(WISH).split()
            self.wishes[name](domain, *map(int, numbers))
        else:
            self.said.append(line)

    @property
    def the_granter(self) -> Domain:
        assert self.granter is not None
        return self.granter

    def look_whether_gone(self, _: Domain) -> None:
        self.seen.append("gone" if not self.the_granter.alive else "alive")

    def look_at_counters(self, domain: Domain) -> None:
        """Hypercalls, messages of page faults, and when its monitor was last asked for something."""
        assert domain.monitor is not None
        self.seen.append(f"{domain.hypercalls} {domain.faults} {domain.monitor._sent_ns}")

    def look_at_secret(self, _: Domain) -> None:
        """Nobody owns the frame now; it was scrubbed, if its grantee let it go."""
        owner = self.hv.frames.frame[self.secret].owner
        words = set(self.hv.machine.read(self.secret, 0, PAGE_SIZE))
        self.seen.append(f"owner {owner:#x}, {'zeros' if words == {0} else 'CHANGED'}")

    def starve_monitor(self, domain: Domain) -> None:
        """It runs where its kernel does, and only when nobody else wants to: a kernel that spins is always in its way."""
        assert domain.process is not None and domain.monitor_process is not None
        cpu = max(os.sched_getaffinity(0))
        os.sched_setscheduler(domain.monitor_process.pid, os.SCHED_IDLE, os.sched_param(0))
        for process in (domain.process, domain.monitor_process):
            os.sched_setaffinity(process.pid, {cpu})

    def revoke(self, how: str, domain: Domain, *numbers: int) -> None:
        self.hv.start(paging_hammer.Hammer(self, domain, numbers).run(how))

    # ---- domains

    def until_done(self, steps: Steps) -> Any:
        """Turn the loop until a continuation has ended. Raises what it raised."""
        ended: list[tuple[Any, BaseException | None]] = []

        def done(value: Any, error: BaseException | None) -> None:
            ended.append((value, error))
            self.hv.loop.soon(lambda: None)  # this turn does not wait for a descriptor any more

        run_task(steps, done)
        while not ended:
            self.hv.loop.step()
        if ended[0][1] is not None:
            raise ended[0][1]
        return ended[0][0]

    def build(self, name: str, frames: int, kernel: Path | None, cmdline: str) -> Domain:
        """Paused, with page tables, ready to be launched where it has a kernel."""
        hv, domid = self.hv, self.next_domid
        self.next_domid += 1
        domain = Domain(domid, f"{name}{domid}", CreateFlags.NATIVE if kernel else CreateFlags.NONE)
        self.until_done(lifecycle.create(hv, domain, frames, ""))
        mfns, end, text = domain.mfn_list, KERNEL_PFN + 2, range(0)
        if kernel is not None:
            image = elf.parse(kernel.read_bytes())
            end, text, domain.entry = image.end_pfn, range(image.text.pfn, image.text.pfn + image.text.pages), image.entry
            for segment in image.segments:
                self.write(domain, segment.pfn, segment.data)
        tables = boot_tables(end, frames + 8)
        info = StartInfo(
            frames, 0, STORE_PFN, 0, CONSOLE_PFN, 0, 0, 0, cmdline, domid, domain.name, VIRT_BASE, KERNEL_WINDOW,
            SHARED_INFO, FD_REQUEST, FD_REPLY, FD_UPCALL, -1, hv.boot_ns, virt(GRANT_PFN), GRANT_ENTRIES, "",
            virt(tables.tables.start), len(tables.tables), virt(tables.mfn_list.start), tables.max_pages,
        )  # fmt: skip
        self.write(domain, START_INFO_PFN, info.pack())
        self.write(domain, tables.mfn_list.start, tables.pack(mfns, text))
        self.l1 = mfns[tables.tables.start + 2]
        self.until_done(mmu.pin(hv, domain, mfns[tables.tables.start], PageType.L3))
        self.until_done(lifecycle.start_with(hv, domain, mfns[tables.tables.start]))
        return domain

    def write(self, domain: Domain, pfn: int, data: bytes) -> None:
        for i in range(0, len(data), PAGE_SIZE):
            self.hv.machine.write(domain.mfn_list[pfn + i // PAGE_SIZE], 0, data[i : i + PAGE_SIZE])

    def make_granter(self) -> None:
        if self.granter is not None and self.granter.alive:
            return
        self.granter = self.build("granter", KERNEL_PFN + 12, None, "")
        self.table, self.secret = self.l1, self.granter.mfn_list[SECRET]
        for pfn in (SECRET, READONLY):
            self.write(self.granter, pfn, struct.pack("<Q", WORD))

    def grant_to(self, domid: int) -> None:
        mfns, access = self.the_granter.mfn_list, Gtf.PERMIT_ACCESS
        entries = (
            (access, self.secret), (access | Gtf.READONLY, mfns[READONLY]), (access, self.table), (Gtf.ACCEPT_TRANSFER, 0),
        )  # fmt: skip
        packed = b"".join(ENTRY.pack(flags, domid, mfn) for flags, mfn in entries)
        self.hv.machine.write(mfns[GRANT_PFN], NR_RESERVED_ENTRIES * ENTRY.size, packed)

    # ---- a job

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The life of one domain."""
        hv = self.hv
        self.said, self.seen = [], []
        self.make_granter()
        self.the_granter.max_frames = hv.frames.owned[self.the_granter.domid] + 1
        before = hv.frames.nr_free + hv.frames.owned[self.the_granter.domid]
        self.grant_to(self.next_domid)
        domain = self.build("attacker", FRAMES, Path(job["kernel"]), self.cmdline(job["cmdline"]))
        domain.max_frames, mfns = FRAMES + 8, list(domain.mfn_list)
        with contextlib.ExitStack() as defects:
            for name in job.get("defects", []):
                defects.enter_context(DEFECTS[name]())
                self.spoiled = True
            with mock.patch.object(budget, "_unpark", wraps=budget._unpark) as unpark, self.neighbour(job, domain):
                domctl.unpause(hv, self.dom0, UnpauseDomain(domain.domid))
                self.until_done(self.life(domain))
                parked = sum(call.args[1] is domain for call in unpark.call_args_list)
        if not self.spoiled:
            hv.frames.check()
        seconds = (time.monotonic_ns() - self.wished_ns) / 1e9
        dirty = self.dirty(mfns)
        lost = before - hv.frames.nr_free - hv.frames.owned[self.the_granter.domid]
        return {
            "exit_code": domain.exit_code, "reason": domain.reason, "said": self.said, "seen": self.seen, "lost": lost,
            "dirty": dirty, "seconds": seconds, "parked": parked,
        }  # fmt: skip

    @contextlib.contextmanager
    def neighbour(self, job: dict[str, Any], hostile: Domain) -> Iterator[None]:
        """A second kernel, on our CPU, that wants something all the time; the hostile one has another."""
        if not job.get("neighbour"):
            yield
            return
        domain = self.build("neighbour", FRAMES, Path(job["kernel"]), "attack=hammer-neighbour")
        cpus = sorted(os.sched_getaffinity(0))
        for process, cpu in ((domain.process, cpus[0]), (hostile.process, cpus[-1]), (hostile.monitor_process, cpus[-1])):
            assert process is not None
            os.sched_setaffinity(process.pid, {cpu})
        os.sched_setaffinity(0, {cpus[0]})
        domctl.unpause(self.hv, self.dom0, UnpauseDomain(domain.domid))
        yield
        self.write(domain, STORE_PFN, struct.pack("<Q", 1))
        self.until_done(self.life(domain))
        os.sched_setaffinity(0, cpus)

    def dirty(self, mfns: list[int]) -> int:
        """How many of a dead domain's frames somebody has stored to since they were scrubbed."""
        free = [mfn for mfn in mfns if not self.hv.frames.frame[mfn].total]
        return sum(self.hv.machine.read(mfn, 0, PAGE_SIZE) != bytes(PAGE_SIZE) for mfn in free)

    def cmdline(self, text: str) -> str:
        frames = self.hv.frames
        free = next(mfn for mfn in reversed(range(NR_FRAMES)) if not frames.frame[mfn].total)
        return (
            f"{text} granter={self.the_granter.domid} table={self.table} secret={self.secret} secret_gref={SECRET_GREF} "
            f"readonly_gref={READONLY_GREF} table_gref={TABLE_GREF} taker_gref={TAKER_GREF} free={free} nr_frames={NR_FRAMES}"
        )

    def life(self, domain: Domain) -> Steps:
        yield domain.dead
        if not self.the_granter.alive:
            yield self.the_granter.dead

    def end(self) -> None:
        self.hv.zygote.stopping = True
        for pid in self.hv.children.live():
            os.kill(pid, signal.SIGKILL)
        while self.hv.children.live():
            self.hv.loop.step()


def main() -> None:
    machine = Machine(Path(sys.argv[1]))
    try:
        ends = [machine.run(job) for job in json.loads(sys.argv[2])]
    finally:
        machine.end()
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
