"""Validation of whole trees: interrupted after each table, failing at every place, with others at work in between; and that
no step of it is long."""

from __future__ import annotations

import errno
from collections import Counter

import pytest

from tests.models.paging import L1, L2, L3, PS, RW, P
from tests.models.paging_core import ROW, load
from tests.models.paging_game import NO_MFN, Game

FRAMES = 24
SLOTS = (0, 7, 511)


def tree(game: Game) -> tuple[list[int], list[int]]:
    """A root with three L2s of three L1s each, in nobody's use: (tables from the root down, the other frames)."""
    own = game.allocate(1, FRAMES)
    tables, rest = own[:13], own[13:]
    for i, slot in enumerate(SLOTS):
        game.poke(tables[0], slot, tables[1 + i] << 12 | P | RW)
        for j, below in enumerate((0, 7, 479)):
            game.poke(tables[1 + i], below, tables[4 + 3 * i + j] << 12 | P | RW)
            game.poke(tables[4 + 3 * i + j], 5, rest[0] << 12 | P | RW)
            game.poke(tables[4 + 3 * i + j], 511, tables[0] << 12 | P)  # the root itself, to be read
    return tables, rest


def walk(game: Game, root: int, between: list[int]) -> int:
    """Pin by hand, a table a step; in between, somebody wants to write each of those frames. Returns the status."""
    lib, mmu, steps = game.core.lib, game.frames.mmu, game.core.ffi.new("struct table_walk *")
    status = lib.table_get(mmu, steps, root, L3, 1, NO_MFN, 0)
    while status == -errno.EAGAIN:
        for mfn in between:
            under_way = game.frames.frame[mfn].done or game.frames.frame[mfn].count
            kind = game.frames.frame[mfn].type
            if game.frames.get(mfn, True):
                game.frames.put(mfn, True)
                assert not (under_way and kind in (L1, L2, L3)), f"mfn {mfn} became writable within a walk"
        status = lib.table_step(mmu, steps, 1)
    game.frames.check(Counter(game.model.holds) + Counter({(root, True): int(not status)}))
    return int(-status)


def test_a_tree_is_validated_in_steps_and_taken_apart_again() -> None:
    game = Game(load(tables_a_turn=1), FRAMES, (1,))
    tables, rest = tree(game)
    assert walk(game, tables[0], [*tables, rest[0]]) == 0
    game.frames.frame[tables[0]].pinned = 1
    game.model.begin()
    assert game.model.pin(1, tables[0], L3) == 0
    game.agree()
    game.unpin(1, tables[0])
    game.quiet()


@pytest.mark.parametrize("what", ["a reserved bit", "another's frame", "a second parent", "a hypervisor's slot", "in use"])
def test_a_failure_anywhere_leaves_nothing(what: str) -> None:
    """One bad entry after another, in every table of the tree: before, among and after the good ones."""
    game = Game(load(), FRAMES + 1, (1, 2))
    tables, rest = tree(game)
    (foreign,) = game.allocate(2, 1)
    game.get(rest[1], True)
    seen = set()
    for table in tables:
        upper = table in tables[:4]
        for slot in (0, 6, 7, 300, 479, 511):
            bad = {
                "a reserved bit": rest[2] << 12 | P | PS,
                "another's frame": foreign << 12 | P,
                "a second parent": tables[4] << 12 | P if upper else tables[4] << 12 | P | RW,
                "a hypervisor's slot": rest[2] << 12 | P if (table, slot) == (tables[3], 511) else rest[2] << 12 | P | PS,
                "in use": rest[1] << 12 | P | RW if upper else tables[1] << 12 | P | RW,
            }[what]
            before = game.model.words[table].get(slot, 0)
            if bad >> 12 == before >> 12:
                continue  # its one parent
            game.poke(table, slot, bad)
            rows = [row[:6] + row[7:] for row in ROW.iter_unpack(game.rows)]
            status = walk(game, tables[0], [])
            assert rows == [row[:6] + row[7:] for row in ROW.iter_unpack(game.rows)], f"mfn {table}, {slot}"
            game.model.begin()
            assert status == game.model.pin(1, tables[0], L3) != 0, f"mfn {table}, {slot}"
            game.agree()
            seen.add(status)
            game.poke(table, slot, before)
    assert seen <= {errno.EINVAL, errno.EBUSY, errno.EPERM}
    assert walk(game, tables[0], []) == 0


def test_references_of_one_frame_do_not_overflow() -> None:
    """Every entry of every other frame may name it, and every grant: fewer than a u32 has room for."""
    from hypervisor.public.layout import M2P_BYTES
    from hypervisor.public.types import MAX_MAPTRACK

    assert M2P_BYTES // 8 * 512 + 1024 * 5 * MAX_MAPTRACK < 1 << 32


def test_a_flush_unmarks_some_tables_in_a_turn() -> None:
    game = Game(load(), 96, (1,), at_once=False)
    space, nr = game.core.space, 40
    own = game.allocate(1, 2 * nr + 2)
    root, page, l2s, l1s = own[0], own[1], own[2 : nr + 2], own[nr + 2 :]
    for slot, (l2, l1) in enumerate(zip(l2s, l1s, strict=True)):
        game.poke(root, slot, l2 << 12 | P | RW)
        game.poke(l2, 0, l1 << 12 | P | RW)
        game.poke(l1, 0, page << 12 | P | RW)
    game.pin(1, root, L3)
    game.quiet()
    game.start(1, root)
    for slot in range(nr):
        game.touch(1, slot << 30, 2)
        game.acknowledge(1)

    def marked() -> int:
        return sum(game.core.lib.mmu_is_mapped(game.frames.mmu, l1, 0) for l1 in l1s)

    assert marked() == nr == len(game.guests[1].host.pages)
    game.flush(1)
    left = nr
    while game.guests[1].call is not None:
        assert left - marked() <= space.FLUSH_SLOTS, "one turn looks at too many tables"
        left = marked()
        game.acknowledge(1)
        game.turn()
        game.safe()
    assert not marked() and not game.guests[1].host.pages
    game.quiet()


@pytest.mark.parametrize("clear", ["the root's entry", "the L2's entry", "the L1's entry"])
def test_what_the_monitor_is_refused_for_a_cleared_entry_is_thrown_out(clear: str) -> None:
    """The host has no mapping left just when it should take some away: the entry that led to them is gone by then."""
    game = Game(load(), FRAMES, (1,), at_once=False)
    root, l2, l1, other, page = game.allocate(1, 5)
    game.poke(root, 0, other << 12 | P | RW)
    game.poke(root, 3, l2 << 12 | P | RW)
    game.poke(l2, 5, l1 << 12 | P | RW)
    game.poke(l1, 7, page << 12 | P | RW)
    game.pin(1, root, L3)
    game.quiet()
    game.start(1, root)
    game.touch(1, 3 << 30 | 5 << 21 | 7 << 12, 2)
    game.acknowledge(1)
    assert len(game.guests[1].host.pages) == 1

    table, slot = {"the root's entry": (root, 3), "the L2's entry": (l2, 5), "the L1's entry": (l1, 7)}[clear]
    game.update(1, [(table << 12 | slot << 3, 0)])
    game.acknowledge(1, fail_at=0)
    while game.guests[1].host.queue or game.turns.waiting:
        game.safe()
        game.acknowledge(1)
        game.turn()
    game.safe()
    assert not game.guests[1].host.pages
    game.quiet()
