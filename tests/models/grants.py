"""A game of grants: domains give, map, unmap, change their page tables, shrink, grow, flip pages and die at any moment;
monitors answer late, or fail.

After every move the machine must be whole: what an address space can touch is counted, belongs to a domain that granted it
and that is not dead, and a frame that changed owner was scrubbed, or came by a flip with what was in it.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

from domain import _guest
from hypervisor import lifecycle, space
from hypervisor.domain import Domain
from hypervisor.loop import run_task
from hypervisor.public.boot_tables import DATA, TABLE
from hypervisor.public.errors import Invalid
from hypervisor.public.grant import (
    ENTRY,
    MAP_REF,
    TRANSFER,
    UNMAP_REF,
    GrantMap,
    GrantStatus,
    GrantTransfer,
    GrantUnmap,
    Gtf,
    MapFlags,
)
from hypervisor.public.layout import GRANT_BASE, GRANT_PFN, KERNEL_PFN, virt
from hypervisor.public.memory import DecreaseReservation, PopulatePhysmap
from hypervisor.public.mmu import Pte, UpdateVaMapping
from hypervisor.public.mmu import entry as pte
from hypervisor.public.traps import PF_WRITE
from hypervisor.public.types import INVALID_PFN, PAGE_SIZE
from tests.models.address_space import ZERO
from tests.models.stand_in import DOMAIN_FRAMES, SCRATCH, StandIn

FIRST_PFN, NR_PFNS = KERNEL_PFN + 5, 4  # pages that are given; the scratch pages lie before them
FIRST_REF, NR_REFS = 8, 4
MOVING_PFN, NR_MOVING = FIRST_PFN + NR_PFNS - 1, 4  # pages whose frames come and go; one of them is given too
TRANSFER_REF = 40  # and NR_MOVING - 1 more: entries that take a frame
FIXED = frozenset((*range(MOVING_PFN), *range(MOVING_PFN + NR_MOVING, DOMAIN_FRAMES)))  # pages whose frames stay
NR_VAS = 600
DOMIDS = (1, 2, 3)


def entry(hv: StandIn, granter: Domain, ref: int) -> tuple[int, int, int]:
    """(flags, domid, frame) of a grant entry as it stands in memory."""
    raw = hv.machine.read(granter.mfn_list[GRANT_PFN + ref // 512], ref % 512 * 8, 8)
    flags, domid, frame = ENTRY.unpack(raw)
    return flags, domid, frame


def give(hv: StandIn, granter: Domain, ref: int, domid: int, pfn: int, readonly: bool = False) -> int:
    """A frame of those it was built of."""
    return give_frame(hv, granter, ref, domid, granter.mfn_list[pfn], readonly)


def give_frame(hv: StandIn, granter: Domain, ref: int, domid: int, mfn: int, readonly: bool = False) -> int:
    """The guest's own function over its own table; 0, or -EBUSY."""
    flags = Gtf.PERMIT_ACCESS | (Gtf.READONLY if readonly else 0)
    table = hv.machine.pointer(granter.mfn_list[GRANT_PFN + ref // 512])
    return _guest.lib.grant_set(_guest.ffi.cast("void *", table), ref % 512, int(flags), domid, mfn)


def end(hv: StandIn, granter: Domain, ref: int) -> int:
    table = hv.machine.pointer(granter.mfn_list[GRANT_PFN + ref // 512])
    return _guest.lib.grant_end(_guest.ffi.cast("void *", table), ref % 512)


@dataclass
class MapRef:
    """One entry of a map array."""

    va: int
    ref: int
    dom: int
    flags: int = MapFlags.HOST_MAP

    def pack(self) -> bytes:
        return MAP_REF.pack(self.va, self.flags, self.ref, self.dom, 99, 99, 99)


def start_map(hv: StandIn, grantee: Domain, refs: list[MapRef], at: int = SCRATCH) -> list[object]:
    """Ask; [value, error] once it ended."""
    hv.write(grantee, b"".join(ref.pack() for ref in refs), at)
    return hv.ask(grantee, GrantMap(at, len(refs)))


def answers(hv: StandIn, grantee: Domain, count: int, at: int = SCRATCH) -> list[tuple[int, int, int]]:
    """(status, handle, dev_bus_addr) of each entry of a map array."""
    raw = b"".join(hv.read(grantee, MAP_REF.size, at + i * MAP_REF.size) for i in range(count))
    return [(status, handle, bus) for _, _, _, _, status, handle, bus in MAP_REF.iter_unpack(raw)]


def map_now(hv: StandIn, grantee: Domain, *refs: MapRef) -> list[tuple[int, int, int]]:
    start_map(hv, grantee, list(refs))
    hv.serve_all()
    return answers(hv, grantee, len(refs))


def start_unmap(hv: StandIn, grantee: Domain, pairs: list[tuple[int, int]], at: int = SCRATCH) -> list[object]:
    """(va, handle) each."""
    hv.write(grantee, b"".join(UNMAP_REF.pack(va, 0, handle, 99, 0) for va, handle in pairs), at)
    return hv.ask(grantee, GrantUnmap(at, len(pairs)))


def unmap_now(hv: StandIn, grantee: Domain, *pairs: tuple[int, int]) -> list[int]:
    start_unmap(hv, grantee, list(pairs))
    hv.serve_all()
    raw = hv.read(grantee, len(pairs) * UNMAP_REF.size)
    return [status for _, _, _, status, _ in UNMAP_REF.iter_unpack(raw)]


class Game:
    """`hv` and the moves; each takes plain numbers, so that a loop and Hypothesis can both play."""

    def __init__(self) -> None:
        self.hv = StandIn(nr_frames=8 * DOMAIN_FRAMES)
        self.busy: dict[int, list[object]] = {}  # the hypercall that each domain waits in
        self.hv.add(0)
        for domid in DOMIDS:
            self.begin(domid)

    def begin(self, domid: int) -> None:
        domain = self.hv.add(domid)
        domain.max_frames += NR_MOVING // 2
        for mfn in domain.mfn_list[FIRST_PFN : MOVING_PFN + NR_MOVING]:
            assert self.hv.machine.read(mfn, 0, PAGE_SIZE) == bytes(PAGE_SIZE), f"mfn {mfn} was not scrubbed"
            self.mark(domain, mfn)

    def mark(self, domain: Domain, mfn: int) -> None:
        """The guest writes its secret into a frame of its own."""
        self.hv.machine.write(mfn, 0, b"secret %d %d" % (domain.domid, mfn))

    def moving(self, domain: Domain) -> list[int]:
        """The frames that a living domain may give away, whether it has them mapped or not."""
        fixed = {domain.mfn_list[pfn] for pfn in FIXED}
        return [mfn for mfn in self.hv.frames.of(domain.domid, range(self.hv.frames.nr_frames)) if mfn not in fixed]

    def alive(self, domid: int) -> Domain | None:
        """The domain, where it lives and waits in no hypercall."""
        domain = self.hv.domains[domid]
        return domain if domain.alive and self.busy.get(domid, [1]) else None

    # ---- moves

    def give(self, domid: int, other: int, ref: int, number: int, readonly: bool) -> None:
        """Of its own frames, and now and then of another's."""
        if domain := self.alive(domid):
            mfns = [*domain.mfn_list[FIRST_PFN : FIRST_PFN + NR_PFNS], *self.moving(domain)]
            give_frame(self.hv, domain, FIRST_REF + ref % NR_REFS, other, mfns[number % len(mfns)], readonly)

    def end(self, domid: int, ref: int) -> None:
        if domain := self.alive(domid):
            ref = FIRST_REF + ref % NR_REFS
            mapped = bool(domain.active.get(ref))
            assert (end(self.hv, domain, ref) != 0) == mapped, "a mapped grant was ended, or one that is not mapped was not"

    def map(self, domid: int, other: int, ref: int, va: int, count: int, readonly: bool) -> None:
        """`count` entries side by side, of references from `ref` on."""
        if domain := self.alive(domid):
            flags = int(MapFlags.HOST_MAP | (MapFlags.READONLY if readonly else 0))
            refs = [
                MapRef(GRANT_BASE + (va + i) % NR_VAS * PAGE_SIZE, FIRST_REF + (ref + i) % NR_REFS, other, flags)
                for i in range(count)
            ]
            self.busy[domid] = start_map(self.hv, domain, refs)

    def unmap(self, domid: int, first: int, count: int) -> None:
        """Some of what it has, and now and then what it has not."""
        if domain := self.alive(domid):
            mine = list(domain.maptrack.values())
            chosen = [mine[(first + i) % len(mine)] for i in range(count)] if mine else []
            pairs = [(m.va, m.handle) for m in chosen] + [(GRANT_BASE, 10**6 + first)]
            self.busy[domid] = start_unmap(self.hv, domain, pairs)

    def place(self, domid: int, pfn: int, number: int, kind: int) -> None:
        """Change what the page tables have at a page that moves: nothing, a frame of its own, or of nobody knows whom."""
        if domain := self.alive(domid):
            mine = self.moving(domain)
            mfn = mine[number % len(mine)] if mine and kind % 8 else number % self.hv.frames.nr_frames
            value = pte(mfn, TABLE if kind % 3 == 0 else DATA) if kind % 2 else 0
            good = self.hv.frames.frame[mfn].owner == domid and not (value & Pte.RW and self.hv.frames.is_table(mfn))
            out = self.busy[domid] = self.hv.ask(domain, UpdateVaMapping(virt(MOVING_PFN + pfn % NR_MOVING), value, 0))
            assert isinstance(out[1], Invalid) == (value != 0 and not good) if out else good or not value

    def touch(self, domid: int, pfn: int, write: bool) -> None:
        """A page fault, whatever call is under way: the hypervisor maps what the tables allow."""
        domain = self.hv.domains[domid]
        if domain.alive and not domain.faulting:
            domain.faulting = True

            def ended(_: object, error: BaseException | None) -> None:
                domain.faulting = False

            run_task(space.fill(self.hv, domain, virt(MOVING_PFN + pfn % NR_MOVING), PF_WRITE * write), ended)

    def shrink(self, domid: int, first: int, count: int) -> None:
        """Give back frames that move, whether they may leave or not."""
        if domain := self.alive(domid):
            mine = self.moving(domain)
            mfns = [mine[(first + i) % len(mine)] for i in range(count)] if mine else []
            idle = [mfn for mfn in mfns if self.hv.frames.is_idle(mfn)]
            self.hv.write(domain, struct.pack(f"<{len(mfns)}Q", *mfns))
            done = self.hv.done(domain, DecreaseReservation(SCRATCH, len(mfns), 0))
            assert done <= len(idle)
            for mfn in mfns[:done]:
                assert self.hv.frames.frame[mfn].owner != domid and self.hv.machine.read(mfn, 0, 64) == bytes(64)

    def grow(self, domid: int, count: int) -> None:
        """Get frames, zeroed, and write into them."""
        if domain := self.alive(domid):
            self.hv.write(domain, struct.pack(f"<{count}Q", *range(count)))
            got = self.hv.done(domain, PopulatePhysmap(SCRATCH, count, 0))
            for mfn in struct.unpack(f"<{got}Q", self.hv.read(domain, 8 * got)):
                assert self.hv.frames.frame[mfn].owner == domid, "another's"
                assert self.hv.machine.read(mfn, 0, PAGE_SIZE) == bytes(PAGE_SIZE), f"mfn {mfn} was not scrubbed"
                self.mark(domain, mfn)

    def accept(self, domid: int, other: int, ref: int) -> None:
        """Let another give us a frame; an entry that is used is begun anew, once its frame is there."""
        domain = self.hv.domains[domid]
        if domain.alive:  # a store into its own table, whatever call of its is under way
            ref = TRANSFER_REF + ref % NR_MOVING
            raw = ENTRY.pack(Gtf.ACCEPT_TRANSFER, other, 0)
            self.hv.machine.write(domain.mfn_list[GRANT_PFN], 8 * ref, raw)

    def flip(self, domid: int, other: int, first: int, count: int) -> None:
        """Give frames to whoever waits for them, or does not."""
        if not (domain := self.alive(domid)):
            return
        hv, mine = self.hv, self.moving(domain)
        moved = [(mine[(first + i) % len(mine)], TRANSFER_REF + (first + i) % NR_MOVING) for i in range(count) if mine]
        was = {mfn: (hv.frames.is_idle(mfn), hv.machine.read(mfn, 0, PAGE_SIZE)) for mfn, _ in moved}
        room = hv.domains[other].max_frames - hv.frames.owned[other]
        hv.write(domain, b"".join(TRANSFER.pack(mfn, other, ref, 99) for mfn, ref in moved))
        hv.done(domain, GrantTransfer(SCRATCH, len(moved)))
        for mfn, _, ref, status in TRANSFER.iter_unpack(hv.read(domain, TRANSFER.size * len(moved))):
            if status == GrantStatus.OKAY:
                room -= 1
                assert hv.frames.frame[mfn].owner == other and was[mfn] == (True, hv.machine.read(mfn, 0, PAGE_SIZE))
                assert entry(hv, hv.domains[other], ref)[::2] == (2 | 4 | 8, mfn) and hv.m2p.pfn[mfn] == INVALID_PFN
        assert room >= 0, "more than its maximum"

    def serve(self, domid: int, fail_at: int | None) -> None:
        space = self.hv.spaces[domid]
        if not space.dead and space.waiting():
            space.serve(fail_at)
            self.check()
            self.hv.loop.settle(2)

    def kill(self, domid: int) -> None:
        """Its end begins; its process and monitor are still there."""
        lifecycle.end(self.hv, self.hv.domains[domid], "killed")

    def die(self, domid: int) -> None:
        """Process and monitor of a dying one are gone; once it is buried, another domain has its number."""
        domain = self.hv.domains[domid]
        if domain.state == "dying":
            self.hv.spaces[domid].die()
            self.hv.loop.settle(3)
        if domain.state == "dead":
            self.hv.forget(domid)
            self.busy.pop(domid, None)
            self.begin(domid)

    # ---- what must hold

    def granter_for(self, domid: int) -> int | None:
        """Somebody of whom `domid` could map something now."""
        for other in DOMIDS:
            domain = self.hv.domains[other]
            if domain.alive and any(
                entry(self.hv, domain, FIRST_REF + i)[0] & Gtf.TYPE_MASK and entry(self.hv, domain, FIRST_REF + i)[1] == domid
                for i in range(NR_REFS)
            ):
                return other
        return None

    def taker_for(self, domid: int) -> int | None:
        """Somebody who would take a frame of `domid`'s now."""
        for other in DOMIDS:
            domain = self.hv.domains[other]
            has_room = domain.alive and other != domid and self.hv.frames.owned[other] < domain.max_frames
            if has_room and any(entry(self.hv, domain, TRANSFER_REF + i)[:2] == (2, domid) for i in range(NR_MOVING)):
                return other
        return None

    def granter_in_use(self) -> int | None:
        """Somebody whose frames another is mapping or unmapping at this moment."""
        for domid, out in self.busy.items():
            if not out:
                for mapping in self.hv.domains[domid].maptrack.values():
                    if mapping.granter.domid != domid and mapping.granter.alive:
                        return mapping.granter.domid
        return None

    def check(self) -> None:
        """The audit of every entry of every table is for quiet(): it costs as much as a hundred moves."""
        self.hv.check(audit=False)
        frame = self.hv.frames.frame
        for domid, domain in self.hv.domains.items():
            at = {m.va: m for m in domain.maptrack.values()}
            assert len(at) == len(domain.maptrack), f"{domain} has two mappings at one address"
            for va, (mfn, writable) in self.hv.spaces[domid].pages.items():
                if va < GRANT_BASE:
                    assert frame[mfn].owner == domid, f"{domain} can touch another's frame"
                if GRANT_BASE <= va < GRANT_BASE + NR_VAS * PAGE_SIZE and mfn != ZERO:
                    mapping = at[va]
                    assert mapping.mfn == mfn and mapping.writable >= writable and not mapping.orphan
                    assert frame[mfn].owner == mapping.granter.domid, f"{domain} can touch a frame of a dead domain"
                    assert mapping.granter.state != "dead", f"{domain} can touch a frame of a dead domain"
            assert self.hv.frames.owned[domid] <= domain.max_frames, f"{domain} owns more than it may"
            if domain.alive:
                self.entries(domain)

    def entries(self, granter: Domain) -> None:
        """The flags in the granter's table say what is mapped."""
        for ref in range(FIRST_REF, FIRST_REF + NR_REFS):
            mappings, (flags, _, _) = granter.active.get(ref, []), entry(self.hv, granter, ref)
            assert bool(flags & Gtf.READING) == bool(mappings), f"{granter}: grant {ref}: reading"
            assert bool(flags & Gtf.WRITING) == any(m.writable for m in mappings), f"{granter}: grant {ref}: writing"

    def quiet(self) -> None:
        """Let everything under way end, and compare to the last reference."""
        for _ in range(3 * len(DOMIDS)):
            self.hv.serve_all()
            for domid in DOMIDS:
                self.die(domid)
        self.check()
        self.hv.quiet()
        for domid in DOMIDS:
            domain = self.hv.domains[domid]
            for i in range(NR_MOVING):
                flags, _, _ = entry(self.hv, domain, TRANSFER_REF + i)
                assert flags in (0, 2, 2 | 4 | 8), f"{domain}: a transfer is committed for ever"

    def close(self) -> None:
        self.hv.close()


class Player:
    """Moves drawn from a seeded generator, the useful ones more often than chance would have it."""

    def __init__(self, game: Game, seed: int) -> None:
        self.game, self.rng = game, random.Random(seed)
        self.weights: list[tuple[int, Callable[[int, int, int], None]]] = [
            (3, self.give), (1, lambda a, b, n: game.end(a, n)), (3, self.map), (2, self.unmap), (1, self.kill),
            (2, lambda a, b, n: game.die(a)), (1, self.shrink), (1, self.grow), (3, self.place), (2, self.flip),
            (10, self.serve), (1, lambda a, b, n: game.touch(a, n, bool(n % 2))),
        ]  # fmt: skip
        self.moves = [move for weight, move in self.weights for _ in range(weight)]

    def play(self, moves: int) -> None:
        try:
            for i in range(moves):
                self.rng.choice(self.moves)(self.rng.choice(DOMIDS), self.rng.choice(DOMIDS), self.rng.randrange(1000))
                self.game.check()
                if i % 200 == 0:
                    self.game.quiet()
            self.game.quiet()
        finally:
            self.game.close()

    # ---- (who, another, a number)

    def give(self, a: int, b: int, n: int) -> None:
        for ref in range(n, n + self.rng.choice((1, NR_REFS))):
            self.game.give(a, b, ref, self.rng.randrange(2 * NR_PFNS), self.rng.random() < 0.3)

    def map(self, a: int, b: int, n: int) -> None:
        if self.rng.random() < 0.8:
            b = self.game.granter_for(a) or b
        self.game.map(a, b, n, self.rng.randrange(NR_VAS), self.rng.choice((1, 2, 5, 150)), self.rng.random() < 0.3)

    def unmap(self, a: int, b: int, n: int) -> None:
        self.game.unmap(a, n, self.rng.choice((1, 2, 5, 70)))

    def kill(self, a: int, b: int, n: int) -> None:
        victim = self.game.granter_in_use()
        if self.rng.random() < (0.3 if victim else 0.1):
            self.game.kill(victim or a)
            if self.rng.random() < 0.5:
                self.game.die(victim or a)

    def shrink(self, a: int, b: int, n: int) -> None:
        self.game.shrink(a, self.idle(a, n), self.rng.randrange(1, 4))
        for ref in range(NR_MOVING):
            self.game.accept(a, b, ref)

    def grow(self, a: int, b: int, n: int) -> None:
        self.game.grow(a, self.rng.randrange(1, 4))

    def place(self, a: int, b: int, n: int) -> None:
        self.game.place(a, n, self.rng.randrange(1000), self.rng.randrange(24))

    def flip(self, a: int, b: int, n: int) -> None:
        self.game.flip(a, self.game.taker_for(a) or b, self.idle(a, n), self.rng.randrange(1, 4))

    def idle(self, a: int, n: int) -> int:
        """Mostly the place of a frame that may leave, among those that move."""
        domain = self.game.alive(a)
        mine = self.game.moving(domain) if domain and n % 4 else []
        return next((i for i, mfn in enumerate(mine) if self.game.hv.frames.is_idle(mfn)), n)

    def serve(self, a: int, b: int, n: int) -> None:
        self.game.serve(a, self.rng.randrange(64) if self.rng.random() < 0.02 else None)


def play(game: Game, moves: int, seed: int = 9) -> None:
    Player(game, seed).play(moves)
