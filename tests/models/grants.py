"""A game of grants: domains give, map, unmap, shrink, grow, flip pages and die at any moment; monitors answer late, or fail.

After every move the machine must be whole: what an address space can touch is counted, belongs to a domain that granted it
and that is not dead, and a frame that changed owner was scrubbed.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

from domain import _guest
from hypervisor import lifecycle
from hypervisor.domain import NO_FRAME, Domain
from hypervisor.public.grant import (
    ENTRY,
    MAP_REF,
    TRANSFER,
    UNMAP_REF,
    GrantMap,
    GrantTransfer,
    GrantUnmap,
    Gtf,
    MapFlags,
)
from hypervisor.public.layout import GRANT_BASE, GRANT_PFN, KERNEL_PFN
from hypervisor.public.memory import DecreaseReservation, PopulatePhysmap
from hypervisor.public.types import PAGE_SIZE
from tests.models.address_space import ZERO
from tests.models.stand_in import DOMAIN_FRAMES, SCRATCH, StandIn

FIRST_PFN, NR_PFNS = KERNEL_PFN + 5, 4  # pages that are given; the scratch pages lie before them
FIRST_REF, NR_REFS = 8, 4
MOVING_PFN, NR_MOVING = FIRST_PFN + NR_PFNS - 1, 4  # pages that come and go; one of them is given too
TRANSFER_REF = 40  # and as many more: for each page that moves, an entry that takes it
NR_VAS = 600
DOMIDS = (1, 2, 3)


def entry(hv: StandIn, granter: Domain, ref: int) -> tuple[int, int, int]:
    """(flags, domid, frame) of a grant entry as it stands in memory."""
    raw = hv.machine.read(granter.p2m[GRANT_PFN + ref // 512], ref % 512 * 8, 8)
    flags, domid, frame = ENTRY.unpack(raw)
    return flags, domid, frame


def give(hv: StandIn, granter: Domain, ref: int, domid: int, pfn: int, readonly: bool = False) -> int:
    """The guest's own function over its own table; 0, or -EBUSY."""
    flags = Gtf.PERMIT_ACCESS | (Gtf.READONLY if readonly else 0)
    table = hv.machine.pointer(granter.p2m[GRANT_PFN + ref // 512])
    return _guest.lib.grant_set(_guest.ffi.cast("void *", table), ref % 512, int(flags), domid, pfn)


def end(hv: StandIn, granter: Domain, ref: int) -> int:
    table = hv.machine.pointer(granter.p2m[GRANT_PFN + ref // 512])
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
        for mfn in domain.p2m:
            assert self.hv.machine.read(mfn, 0, PAGE_SIZE) == bytes(PAGE_SIZE), f"mfn {mfn} was not scrubbed"
        for pfn in range(FIRST_PFN, FIRST_PFN + NR_PFNS):
            self.hv.machine.write(domain.p2m[pfn], 0, b"secret" * 100)

    def alive(self, domid: int) -> Domain | None:
        """The domain, where it lives and waits in no hypercall."""
        domain = self.hv.domains[domid]
        return domain if domain.alive and self.busy.get(domid, [1]) else None

    # ---- moves

    def give(self, domid: int, other: int, ref: int, pfn: int, readonly: bool) -> None:
        if domain := self.alive(domid):
            give(self.hv, domain, FIRST_REF + ref % NR_REFS, other, FIRST_PFN + pfn % NR_PFNS, readonly)

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

    def reserve(self, domid: int, pfn: int, count: int, more: bool) -> None:
        """The reservation shrinks or grows by pages that may come and go."""
        if domain := self.alive(domid):
            pfns = [MOVING_PFN + (pfn + i) % NR_MOVING for i in range(count)]
            self.hv.write(domain, struct.pack(f"<{count}Q", *pfns))
            kind = PopulatePhysmap if more else DecreaseReservation
            self.busy[domid] = self.hv.ask(domain, kind(SCRATCH, count))

    def accept(self, domid: int, other: int, pfn: int) -> None:
        """Let another put a frame where a hole of ours is; an entry that is used is begun anew, once its frame is there."""
        domain = self.hv.domains[domid]
        if domain.alive:  # a store into its own table, whatever call of its is under way
            pfn %= NR_MOVING
            flags, _, _ = entry(self.hv, domain, TRANSFER_REF + pfn)
            if flags != Gtf.ACCEPT_TRANSFER | Gtf.TRANSFER_COMMITTED:
                raw = ENTRY.pack(Gtf.ACCEPT_TRANSFER, other, MOVING_PFN + pfn)
                self.hv.machine.write(domain.p2m[GRANT_PFN], 8 * (TRANSFER_REF + pfn), raw)

    def flip(self, domid: int, other: int, pfn: int, count: int) -> None:
        """Give pages to whoever waits for them, or does not."""
        if domain := self.alive(domid):
            moved = [(pfn + i) % NR_MOVING for i in range(count)]
            records = b"".join(TRANSFER.pack(MOVING_PFN + m, other, TRANSFER_REF + (m + pfn) % NR_MOVING, 99) for m in moved)
            self.hv.write(domain, records)
            self.busy[domid] = self.hv.ask(domain, GrantTransfer(SCRATCH, count))

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
        """Somebody who would take a page of `domid`'s now."""
        for other in DOMIDS:
            domain = self.hv.domains[other]
            for i in range(NR_MOVING if domain.alive else 0):
                if entry(self.hv, domain, TRANSFER_REF + i)[:2] == (2, domid) and domain.p2m[MOVING_PFN + i] == NO_FRAME:
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
        self.hv.check()
        for domid, domain in self.hv.domains.items():
            at = {m.va: m for m in domain.maptrack.values()}
            assert len(at) == len(domain.maptrack), f"{domain} has two mappings at one address"
            for va, (mfn, writable) in self.hv.spaces[domid].pages.items():
                if va < GRANT_BASE:
                    assert domain.state == "dead" or self.hv.frames.owner[mfn] == domid, f"{domain} can touch another's frame"
                if GRANT_BASE <= va < GRANT_BASE + NR_VAS * PAGE_SIZE and mfn != ZERO:
                    mapping = at[va]
                    assert mapping.mfn == mfn and mapping.writable >= writable and not mapping.orphan
                    assert mfn in mapping.granter.p2m, f"{domain} can touch a frame of a dead domain"
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
            assert not domain.leaving and not domain.expected, f"{domain}: a frame is on its way for ever"
            owned = [mfn for mfn in domain.p2m if mfn != NO_FRAME]
            assert self.hv.frames.owned[domid] == len(owned) == len(set(owned)), f"{domain}: frames that are in no p2m"
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
            (2, lambda a, b, n: game.die(a)), (2, self.reserve), (3, self.flip), (9, self.serve),
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
            self.game.give(a, b, ref, self.rng.randrange(NR_PFNS), self.rng.random() < 0.3)

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

    def reserve(self, a: int, b: int, n: int) -> None:
        self.game.reserve(a, n, self.rng.randrange(1, 4), self.rng.random() < 0.3)
        for pfn in range(NR_MOVING):
            self.game.accept(a, b, pfn)

    def flip(self, a: int, b: int, n: int) -> None:
        self.game.flip(a, self.game.taker_for(a) or b, self.rng.choice((0, n)), self.rng.randrange(1, 4))

    def serve(self, a: int, b: int, n: int) -> None:
        self.game.serve(a, self.rng.randrange(64) if self.rng.random() < 0.02 else None)


def play(game: Game, moves: int, seed: int = 9) -> None:
    Player(game, seed).play(moves)
