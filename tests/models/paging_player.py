"""Moves for a game of paging, from a seeded generator: the useful ones more often than chance would have them, and the worst.

Guests choose from few frames and few slots, so that they come back to the same ones: what is mapped twice, moved, made a
table of while somebody writes it, or named by itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from tests.models.paging import L1, L2, L3, NX, PS, RW, A, D, G, P, mfn_of
from tests.models.paging_game import Game

T = TypeVar("T")
SLOTS = (0, 0, 0, 1, 1, 2, 15, 16, 255, 256, 479, 480, 511, 511)
OF_A_ROOT = (0, 0, 1, 255, 256, 511, 511, 511)
SHARE = 12  # frames that a guest has of the machine, about
FAR = (1 << 35, 1 << 39, 0xFFFFFFFF)  # frames that there are not


class Player:
    def __init__(self, game: Game, seed: int) -> None:
        self.game, self.rng = game, random.Random(seed)
        self.chance = self.rng.random
        self.moves_made = 0
        self.own: dict[int, list[int]] = {domid: [] for domid in game.guests}
        weights: list[tuple[int, Callable[[int], None]]] = [
            (56, self.update), (9, self.pin), (7, self.unpin), (4, self.get), (4, self.put), (3, self.reserve), (1, self.flip),
            (3, self.load), (9, self.touch), (1, self.flush), (1, self.invalidate), (4, self.poke), (1, self.describe),
            (2, self.fill),
        ]  # fmt: skip
        self.moves = [move for weight, move in weights for _ in range(weight)]
        for domid in game.guests:
            self.begin(domid)

    def begin(self, domid: int) -> None:
        """A new domain: a root in window 0, an L2 and an L1 below it, so that there is something to map in."""
        own = self.own[domid] = self.game.allocate(domid, SHARE)
        root, l2, l1 = own[:3]
        self.game.poke(root, 0, l2 << 12 | P | RW)
        self.game.poke(l2, 0, l1 << 12 | P | RW)
        self.game.pin(domid, root, L3)
        if self.game.guests[domid].call is not None:
            self.game.quiet()
        self.game.start(domid, root)

    # ---- choices

    def pick(self, of: Sequence[T]) -> T:
        """As rng.choice, in a third of its time."""
        return of[int(self.chance() * len(of))]

    def frame(self, domid: int, kind: int | None = None) -> int:
        """Mostly its own; of a type in force, if one is soon found."""
        rng, own = self.rng, self.own[domid]
        if not own or self.chance() < 0.03:
            return self.pick(FAR) if self.chance() < 0.3 else rng.randrange(self.game.nr_frames + 2)
        mfn = self.pick(own)
        if kind is not None:
            for _ in range(5):
                f = self.game.model.frames[mfn]
                if f.typed and f.type == kind:
                    break
                mfn = self.pick(own)
        return mfn

    def value(self, domid: int, kind: int) -> int:
        """An entry for a table of that type: good ones for the most part."""
        rng = self.rng
        dice = self.chance()
        if dice < 0.25:
            return 0 if dice < 0.2 else rng.getrandbits(64) & ~(P | 1 << 44)  # no good descriptor either
        bits = P if dice < 0.5 else P | RW
        if dice > 0.9:
            bits |= self.pick((NX, A, D, A | D, PS, G, 1 << 9, 1 << 62))
        mfn = self.frame(domid, kind - 1 if kind in (L2, L3) and dice < 0.8 else None)
        return mfn << 12 & (1 << 52) - 1 | bits

    def request(self, domid: int) -> tuple[int, int]:
        kind = self.pick((L1, L1, L1, L2, L2, L3))
        table = self.frame(domid, kind)
        command = 0 if self.chance() < 0.9 else self.pick((1, 2, 2, 2, 3))
        if table < self.game.nr_frames and self.game.model.frames[table].typed:
            kind = self.game.model.frames[table].type
        slot = self.pick(OF_A_ROOT if kind == L3 else SLOTS)
        return table << 12 & (1 << 64) - 1 | slot << 3 | command, self.value(domid, kind)

    def retype(self, domid: int) -> list[tuple[int, int]]:
        """A writable frame is unmapped everywhere, and made a table: in one batch, which must wait for the host in between."""
        m = self.game.model
        mfn = self.frame(domid)
        if mfn >= self.game.nr_frames:
            return [self.request(domid)]
        entries = [
            (table << 12 | slot << 3, 0)
            for table in self.own[domid]
            if m.frames[table].typed and m.frames[table].type == L1
            for slot, entry in m.words[table].items()
            if entry & P and mfn_of(entry) == mfn
        ]
        l2 = self.frame(domid, L2)
        again = (self.frame(domid, L1) << 12 & (1 << 64) - 1 | self.pick(SLOTS) << 3, mfn << 12 | P)
        return [*entries, (l2 << 12 & (1 << 64) - 1 | self.pick(SLOTS) << 3, mfn << 12 | P | RW), again]

    # ---- moves

    def update(self, domid: int) -> None:
        rng = self.rng
        dice = self.chance()
        if dice < 0.04:
            batch = self.retype(domid)
        else:
            batch = [self.request(domid)]
            for _ in range(0 if dice < 0.4 else rng.randrange(1, 12)):
                if self.chance() < 0.3:  # the same entry again
                    batch.append((batch[-1][0], self.value(domid, L1)))
                else:
                    batch.append(self.request(domid))
        self.game.update(domid, batch)

    def pin(self, domid: int) -> None:
        level = self.pick((L1, L2, L2, L3))
        self.game.pin(domid, self.frame(domid, level if self.chance() < 0.3 else None), level)

    def unpin(self, domid: int) -> None:
        mfn = self.frame(domid)
        for _ in range(4):
            if mfn < self.game.nr_frames and self.game.model.frames[mfn].pinned:
                break
            mfn = self.frame(domid)
        self.game.unpin(domid, mfn)

    def get(self, domid: int) -> None:
        mfn = self.frame(domid)
        if mfn < self.game.nr_frames and not self._foreign_call(mfn):
            self.game.get(mfn, self.chance() < 0.5)

    def put(self, domid: int) -> None:
        holds = [key for key, times in self.game.model.holds.items() if times and not self._foreign_call(key[0])]
        for _ in range(2):
            if holds:
                mfn, writable = self.pick(holds)
                self.game.put(mfn, writable)

    def _foreign_call(self, mfn: int) -> bool:
        owner = self.game.model.frames[mfn].owner
        return owner is not None and self.game.busy(owner)

    def reserve(self, domid: int) -> None:
        own = self.own[domid]
        if self.chance() < 0.5 and len(own) < SHARE + 3:
            own += self.game.allocate(domid, self.rng.randrange(1, 3))
        elif len(own) > SHARE - 3:
            for mfn in self.rng.sample(own, 3):
                if self.game.release(mfn):
                    own.remove(mfn)
                    break

    def flip(self, domid: int) -> None:
        to = self.pick(list(self.own))
        idle = [mfn for mfn in self.own[domid] if self.game.model.is_idle(mfn)]
        fair = len(self.own[domid]) > SHARE - 3 and len(self.own[to]) < SHARE + 3
        if to != domid and idle and fair and not self.game.busy(to):
            self.game.give(idle[0], to)
            self.own[domid].remove(idle[0])
            self.own[to].append(idle[0])

    def load(self, domid: int) -> None:
        self.game.load(domid, self.frame(domid, L3))

    def _address(self, domid: int) -> int:
        """Of something mapped, or near it."""
        pages = self.game.guests[domid].host.pages
        windows = [w for w, root in enumerate(self.game.model.spaces[domid].windows) if root is not None]
        if pages and self.chance() < 0.5:
            return self.pick(list(pages))
        mappable = self.game.model.mappable(domid) if self.chance() < 0.3 else None
        if mappable:
            return self.pick(list(mappable))
        return self.pick(windows) << 39 | self.pick(SLOTS) << 12

    def touch(self, domid: int) -> None:
        self.game.touch(domid, self._address(domid), self.pick((0, 2, 2, 16)) & 2)

    def flush(self, domid: int) -> None:
        self.game.flush(domid)

    def invalidate(self, domid: int) -> None:
        current = self.game.model.spaces[domid].current
        at = self._address(domid)
        self.game.invalidate(domid, at & (1 << 39) - 1 if at >> 39 == current or self.chance() < 0.5 else 1 << 39)

    def poke(self, domid: int) -> None:
        mfn = self.frame(domid)
        if mfn < self.game.nr_frames and self.game.model.frames[mfn].owner == domid:
            for _ in range(self.pick((1, 1, 3))):
                self.game.poke(mfn, self.pick(SLOTS), self.value(domid, self.pick((L1, L1, L2, L3))))

    def describe(self, domid: int) -> None:
        mine = [mfn for mfn in self.game.model.segments if self.game.model.frames[mfn].owner == domid]
        mfn = self.pick(mine) if len(mine) > 1 else self.frame(domid)
        if mfn < self.game.nr_frames and (mfn in mine or mfn not in self.game.model.segments):
            self.game.describe(domid, mfn)

    def fill(self, domid: int) -> None:
        self.game.fill(domid, self.frame(domid), self.frame(domid) if self.chance() < 0.2 else None)

    # ---- a run

    @property
    def operations(self) -> int:
        """Moves, and requests of a batch beyond the first, as far as they were looked at."""
        return self.moves_made + self.game.requests

    def move(self, domid: int) -> None:
        self.moves_made += 1
        self.pick(self.moves)(domid)

    def bury(self) -> None:
        for domid in self.game.bury():
            self.begin(domid)

    def play(self, operations: int, audit_every: int = 20_000, life: int = 3000) -> None:
        """With every answer at once; every so often somebody dies, and everything is looked at."""
        game, domids = self.game, list(self.own)
        audit = death = 0
        for guest in game.guests.values():
            guest.host.fail_every = 97
        while self.operations < operations:
            self.move(self.pick(domids))
            game.safe()
            if self.operations >= death + life:
                death = self.operations
                game.kill(self.pick(domids))
                self.bury()
            if self.operations >= audit + audit_every:
                audit = self.operations
                game.quiet()
        game.quiet()

    def play_late(self, steps: int, audit_every: int = 1000) -> None:
        """Monitors that answer when it pleases the generator, turns and faults in between, death at any moment."""
        game, domids = self.game, list(self.own)
        for step in range(steps):
            domid, dice = self.pick(domids), self.chance()
            if dice < 0.4:
                if not game.busy(domid):
                    self.move(domid)
            elif dice < 0.55:
                self.touch(domid)
            elif dice < 0.6:
                if game.guests[domid].host.queue:
                    game.guests[domid].host.progress(self.rng.randrange(3))
            elif dice < 0.9:
                fail_at = None if self.chance() < 0.85 else self.rng.randrange(2)
                game.acknowledge(domid, fail_at, 12 if self.chance() < 0.995 else 22)
            elif dice < 0.9995:
                game.turn()
            else:
                game.kill(domid)
            game.safe()
            if game.ended:
                self.bury()
            if step % audit_every == 0:
                game.quiet()
                self.bury()
        game.quiet()
