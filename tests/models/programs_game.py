"""The game that spaces of applications are tested by, and its model: what each program may have mapped, what may leave.

A kernel with three user roots makes, changes and ends spaces, its programs fault, lie and die, its frames leave, and monitors
answer late, with errors or never. Each move says what must come of it. At any moment nothing is mapped that is not counted; and
once all have answered, every program has mapped what the model says, no more.
"""

from __future__ import annotations

import itertools
import random
import signal
import struct
from typing import Any

import pytest

from hypervisor.domain import Trap
from hypervisor.public.boot_tables import TABLE, UPPER
from hypervisor.public.errors import Busy, Invalid, NoEntry, NoSpace, XenError
from hypervisor.public.grant import ENTRY, TRANSFER, GrantTransfer, Gtf
from hypervisor.public.layout import GRANT_PFN, HYPERVISOR_VIRT_START, KERNEL_PFN, SPACE_BYTES, virt
from hypervisor.public.memory import DecreaseReservation, IncreaseReservation
from hypervisor.public.mmu import EXT_OP, UPDATE, MmuextCommand, MmuextOp, MmuUpdate, Pte, entry
from hypervisor.public.traps import PF_WRITE, RETRY, VERDICT, Vector
from hypervisor.public.types import DOMID_SELF, PAGE_SIZE
from hypervisor.public.user import CONTROL_PAGES, USER_CONTROL, USER_START, UserDestroy, UserInterrupt
from tests.models.programs import Program, Programs, fault
from tests.models.stand_in import DOMAIN_FRAMES, SCRATCH

ROOTS, CONTROLS, DATA = 3, 3, 6
SLOTS = (3, 16, 17, 300, 511)  # of an L1; the host has nothing at the first
OWN = ROOTS * 3 + CONTROLS * CONTROL_PAGES + DATA  # frames of the kernel's, from its second page on
FRAMES = DOMAIN_FRAMES + OWN
TAKER, GREF = 2, 9
ERRORS = {"refused": 1, "nothing left": 12}  # of a monitor: EPERM, ENOMEM
Shown = tuple[tuple[int, ...], Program]


class Game:
    """The kernel, and the model of what its programs may see."""

    def __init__(self) -> None:
        self.hv = hv = Programs()
        hv.add(0)
        self.domain = domain = hv.add(1, FRAMES)
        domain.traps[Vector.SYSTEM_CALL] = Trap(virt(KERNEL_PFN), False)
        self.taker = hv.add(TAKER)
        self.taker.max_frames = domain.max_frames = hv.frames.nr_frames
        own = domain.mfn_list[KERNEL_PFN + 1 :][:OWN]
        self.pfn = {mfn: KERNEL_PFN + 1 + i for i, mfn in enumerate(own)}
        self.tables = [own[3 * i : 3 * i + 3] for i in range(ROOTS)]  # L3, L2, L1
        rest = own[3 * ROOTS :]
        self.controls = [tuple(rest[i * CONTROL_PAGES :][:CONTROL_PAGES]) for i in range(CONTROLS)]
        self.data = rest[CONTROLS * CONTROL_PAGES :]  # frames that come and go; what is gone is another's
        self.mine = set(self.data)
        self.entries: list[dict[int, tuple[int, bool]]] = [{} for _ in range(ROOTS)]
        self.hooked = [True] * ROOTS  # the L1 is in its L2
        self.faulting = set[int]()  # roots whose programs fault while the next call is under way
        self.shown: dict[int, Shown] = {}  # root -> the control region and the program, which may be dead
        for mfn in (*self.data, *self.controls[-1]):  # that control region is nowhere else: only its being one holds it
            hv.hide(domain, self.pfn[mfn])
        for tables in self.tables:
            for table, below in itertools.pairwise(tables):
                hv.machine.write(table, 0, struct.pack("<Q", entry(below, UPPER)))
            for mfn in tables:
                hv.show(domain, self.pfn[mfn], mfn, TABLE)
            self.extended(MmuextCommand.PIN_L3, tables[0])

    def close(self) -> None:
        self.hv.close()

    # ---- asking

    def ask(self, request: Any, how: str = "well") -> Any:
        """Its value. `how` the programs' monitors answer that are asked for something: well, with an error, or never, since
        their program dies. However that is, there is a look at what is mapped before."""
        hv = self.hv
        out = hv.ask(self.domain, request)
        asked = self.fault_meanwhile()
        hv.settle()
        hv.check(audit=False)
        for program in hv.programs:
            if how != "well" and not program.dead and program.waiting():
                if how == "never":
                    hv.processes[program.pids[0]].signal(signal.SIGKILL)
                    hv.bury()
                else:
                    program.serve(0, ERRORS[how])
                hv.settle()
                hv.check(audit=False)
        hv.settle()
        hv.check(audit=False)
        hv.serve_all()
        for program in asked:
            answers = program.hear(), program.hear()
            assert program.dead or all(answers), "each fault is answered"
        assert out, "it has ended"
        if out[1] is not None:
            raise out[1]
        return out[0]

    def fault_meanwhile(self) -> list[Program]:
        """Some programs fault while a call is under way: the answer may be of the tables before it, or after."""
        asked = [self.shown[root][1] for root in self.faulting if root in self.shown and not self.shown[root][1].dead]
        for program in asked:
            program.say(fault(SLOTS[-1] * PAGE_SIZE, PF_WRITE))
            program.say(fault(SLOTS[1] * PAGE_SIZE, 0))
        self.faulting.clear()
        return asked

    def extended(self, command: int, first: int, second: int = 0, how: str = "well") -> int:
        self.hv.write(self.domain, EXT_OP.pack(command, first, second))
        return int(self.ask(MmuextOp(SCRATCH, 1, 0, DOMID_SELF), how))

    def refused(self, error: type[XenError], request: Any, *arguments: Any) -> None:
        with pytest.raises(error):
            request(*arguments)

    # ---- moves: each says what must come of it

    def create(self, root: int, control: list[int], how: str = "well") -> None:
        self.hv.write(self.domain, struct.pack(f"<{CONTROL_PAGES}Q", *control), SCRATCH + 2048)
        arguments = MmuextCommand.NEW_USER_BASEPTR, self.tables[root][0], SCRATCH + 2048
        if root in self.shown:
            self.refused(Busy, self.extended, *arguments)
        elif len(set(control)) < CONTROL_PAGES or not all(map(self.may_be_control, control)):
            self.refused(Invalid, self.extended, *arguments)
        elif self.hv.refusing or self.hv.stillborn:
            self.refused(NoSpace, self.extended, *arguments)
        elif how != "well":
            with pytest.raises(NoSpace):
                self.extended(*arguments, how=how)
        else:
            assert self.extended(*arguments, how=how) == 1
            self.shown[root] = tuple(control), self.hv.programs[-1]
            assert self.hv.programs[-1].hear() == b"go"

    def may_be_control(self, mfn: int) -> bool:
        """It is the kernel's, and no table."""
        unhooked = {self.tables[r][2] for r in range(ROOTS) if not self.hooked[r]}
        return mfn in self.mine | unhooked or any(mfn in control for control in self.controls)

    def destroy(self, root: int) -> None:
        request = UserDestroy(self.tables[root][0])
        if root not in self.shown:
            self.refused(NoEntry, self.ask, request)
            return
        self.ask(request)
        _, program = self.shown.pop(root)
        assert program.dead and not program.pages

    def interrupt(self, root: int) -> None:
        request = UserInterrupt(self.tables[root][0])
        if root not in self.shown:
            self.refused(NoEntry, self.ask, request)
            return
        process = self.hv.processes[self.shown[root][1].pids[0]]
        wanted = process.signals.count(signal.SIGUSR1) + (not process.ended)
        self.ask(request)
        assert process.signals.count(signal.SIGUSR1) == wanted

    def update(self, root: int, slot: int, mfn: int | None, writable: bool, how: str = "well") -> None:
        value = 0 if mfn is None else entry(mfn, Pte.PRESENT | (Pte.RW if writable else 0))
        self.hv.write(self.domain, UPDATE.pack(self.tables[root][2] << 12 | slot << 3, value))
        request = MmuUpdate(SCRATCH, 1, 0, DOMID_SELF)
        if self.hooked[root] and mfn is not None and mfn not in self.mine:  # else it is no table, and takes any word
            self.refused(XenError, self.ask, request)
            return
        self.ask(request, how)
        if mfn is None:
            self.entries[root].pop(slot, None)
        else:
            self.entries[root][slot] = mfn, writable

    def hook(self, root: int, how: str = "well") -> None:
        """The L1 out of its L2, or into it again."""
        _, l2, l1 = self.tables[root]
        self.hv.write(self.domain, UPDATE.pack(l2 << 12, 0 if self.hooked[root] else entry(l1, UPPER)))
        request = MmuUpdate(SCRATCH, 1, 0, DOMID_SELF)
        foreign = {mfn for mfn, _ in self.entries[root].values()} - self.mine
        is_control = any(l1 in control for control, _ in self.shown.values())
        if not self.hooked[root] and (foreign or is_control):
            self.refused(XenError, self.ask, request)
            return
        self.ask(request, how)
        self.hooked[root] = not self.hooked[root]

    def fault(self, root: int, address: int, write: bool) -> None:
        if root not in self.shown or self.shown[root][1].dead:
            return
        _, program = self.shown[root]
        program.say(fault(address, PF_WRITE * write))
        self.hv.settle()
        self.hv.check()
        self.hv.serve_all()
        answer = program.hear()
        mfn, writable = self.may_see(root).get(address & -PAGE_SIZE, (-1, False))
        allowed = mfn >= 0 and (writable or not write)
        assert program.dead or (VERDICT.unpack(answer)[0] == RETRY) == allowed, "the verdict"
        assert program.dead or not allowed or program.pages[address & -PAGE_SIZE] == (mfn, writable)

    def lie(self, root: int, message: bytes) -> None:
        """On the socket of faults, what is none."""
        if root in self.shown and not self.shown[root][1].dead:
            _, program = self.shown[root]
            program.say(message)
            self.hv.settle()
            self.hv.serve_all()
            assert program.dead, "it goes on"

    def kill(self, root: int, which: int = 0) -> None:
        """The application's process or its monitor."""
        if root in self.shown:
            self.hv.processes[self.shown[root][1].pids[which]].signal(signal.SIGKILL)

    def leave(self, mfn: int, way: str) -> None:
        """Back to the machine, or to a neighbour: where no table says it and no program's control region is made of it."""
        in_tables = any(mfn == one for r in range(ROOTS) if self.hooked[r] for one, _ in self.entries[r].values())
        in_use = in_tables or any(mfn in control for control, _ in self.shown.values())
        if mfn in self.controls[-1] and not in_use:
            return  # it could, but then there would be no such region
        self.hv.write(self.domain, struct.pack("<Q", mfn) if way == "down" else TRANSFER.pack(mfn, TAKER, GREF, 99))
        if way == "down":
            done = self.ask(DecreaseReservation(SCRATCH, 1, 0))
        else:
            grants = self.taker.mfn_list[GRANT_PFN]
            self.hv.machine.write(grants, GREF * ENTRY.size, ENTRY.pack(Gtf.ACCEPT_TRANSFER, 1, 0))
            done = self.ask(GrantTransfer(SCRATCH, 1))
        assert done == (mfn in self.mine and not in_use)
        self.mine -= {mfn} if done else set()

    def come(self) -> None:
        """A frame in place of one that has left."""
        lost = [i for i, mfn in enumerate(self.data) if mfn not in self.mine]
        if lost:
            self.hv.write(self.domain, bytes(8))
            assert self.ask(IncreaseReservation(SCRATCH, 1, 0)) == 1
            (mfn,) = struct.unpack("<Q", self.hv.read(self.domain, 8))
            self.data[lost[0]] = mfn
            self.mine.add(mfn)

    # ---- what must hold

    def may_see(self, root: int) -> dict[int, tuple[int, bool]]:
        """By address: what its tables say, but for where the host maps nothing."""
        pages = {slot * PAGE_SIZE: page for slot, page in self.entries[root].items() if self.hooked[root]}
        return {at: page for at, page in pages.items() if at >= USER_START}

    def settled(self) -> None:
        self.hv.serve_all()
        self.hv.quiet()
        for root, (control, program) in self.shown.items():
            region = {USER_CONTROL + i * PAGE_SIZE: (mfn, True) for i, mfn in enumerate(control)}
            for address, page in program.pages.items():
                assert page == (region | self.may_see(root)).get(address), f"root {root} shows {page} at {address:#x}"
            assert program.dead or region.items() <= program.pages.items(), "the control region"

    def end(self) -> None:
        """The domain dies in the middle of a call, and its programs with it."""
        self.settled()
        self.hv.write(self.domain, b"".join(UPDATE.pack(l2 << 12, 0) for _, l2, _ in self.tables))
        self.hv.ask(self.domain, MmuUpdate(SCRATCH, ROOTS, 0, DOMID_SELF))
        self.faulting = set(range(ROOTS))
        self.fault_meanwhile()
        self.hv.settle()
        self.hv.check(audit=False)
        self.hv.kill(1)
        self.hv.check(audit=False)
        self.hv.serve_all()
        assert self.domain.state == "dead" and not self.hv.frames.owned[1] and all(p.dead for p in self.hv.programs)
        self.hv.check()


# ---- moves by chance


def control_of(game: Game, which: int, at: int, other: str) -> list[int]:
    """A control region, or one with a frame of another kind in it."""
    control = list(game.controls[which])
    others = {
        "a page": game.data[at % DATA], "a table": game.tables[at % ROOTS][at % 3], "twice": control[at - 1],
        "a neighbour's": game.taker.mfn_list[KERNEL_PFN], "none": 1 << 40, "": control[at],
    }  # fmt: skip
    control[at] = others[other]
    return control


OTHERS = ("", "", "", "", "a page", "a table", "twice", "a neighbour's", "none")
HOW = ("well", "well", "well", "refused", "nothing left", "never")
ADDRESSES = (
    *(slot * PAGE_SIZE + 8 for slot in SLOTS), 0, SPACE_BYTES - 8, SPACE_BYTES + 16 * PAGE_SIZE, HYPERVISOR_VIRT_START,
    USER_CONTROL, (1 << 64) - 8, 17 << 39,
)  # fmt: skip
LIES = (b"", b"x", bytes(39), bytes(41))


def play(game: Game, seed: int, moves: int) -> None:
    """A game, the same for the same seed."""
    pick = random.Random(seed)
    for _ in range(moves):
        root, slot, how, flag = pick.randrange(ROOTS), pick.choice(SLOTS), pick.choice(HOW), pick.random() < 0.5
        move = pick.randrange(16)
        if pick.random() < 0.3:
            game.faulting.add(pick.randrange(ROOTS))
        if root not in game.shown or move == 0:
            game.hv.refusing, game.hv.stillborn = pick.random() < 0.1, pick.random() < 0.1
            control = control_of(game, pick.randrange(CONTROLS), pick.randrange(CONTROL_PAGES), pick.choice(OTHERS))
            game.create(root, control, pick.choice((*HOW, *("well",) * 6)))
        elif move == 1 or (game.shown[root][1].dead and flag):
            game.destroy(root)
        elif move < 8:
            game.update(root, slot, pick.choice((*game.data, None, game.taker.mfn_list[KERNEL_PFN])), flag, how)
        elif move < 11:
            game.fault(root, pick.choice(ADDRESSES), flag)
        elif move == 11:
            game.hook(root, how)
        elif move < 14:
            game.leave(pick.choice((*game.data, *game.controls[-1])), "down" if flag else "over")
            game.come()
        elif move == 14:
            pick.choice((game.interrupt, game.interrupt, game.interrupt, game.kill))(root)
        elif pick.random() < 0.2:
            game.lie(root, pick.choice(LIES))
        else:
            game.settled()
