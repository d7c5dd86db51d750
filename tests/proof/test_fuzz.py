"""A million plays of hostile peers against our C; what they found once; and defects that they must find.

scripts/fuzz does it at length.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import NIGHTLY
from tests.models.mutant import Changes
from tests.proof.build import CHECKED
from tests.proof.fuzz import TARGETS, TOTAL, Result, corpus, play, replay, share

RUNS = TOTAL if NIGHTLY else 1_000_000  # of all targets together

pytestmark = pytest.mark.timeout(7200 if NIGHTLY else 300)


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    """What each target came to, played side by side."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        done = pool.map(lambda name: play(name, share(name, RUNS)), TARGETS)
        return dict(zip(TARGETS, done, strict=True))


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_peers_are_held_off(results: dict[str, Result], name: str) -> None:
    result = results[name]
    assert result.sound, f"{result.says[-4000:]}\nthe play: {result.play}"
    assert "Done " in result.says


@pytest.mark.parametrize("path", corpus(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_once_is_not_found_again(path: Path) -> None:
    result = replay(path)
    assert result.sound, result.says[-4000:]


# ---- what must be found: in C of ours, within the executions of a default run


def defect(target: str, path: str, old: str, new: str, say: str, always: bool = False) -> object:
    marks = [] if always else [pytest.mark.nightly]
    return pytest.param(target, {path: [(old, new)]}, id=f"{target}: {say}", marks=marks)


RING, BLK, SWITCH, NET = "ringlib/ring.h", "dom0/blk.c", "dom0/switch.c", "domain/net.c"
CALLRING, EVTCHN, GRANT, GUEST = "hypervisor/callring.c", "hypervisor/evtchn.c", "hypervisor/grant.c", "domain/guest.c"
FRAMES = "hypervisor/frames.c"
IN_USE = "!(s->before & GTF_READING)"
ACCEPTED = "(uint64_t)domid << 16 | GTF_ACCEPT_TRANSFER | GTF_TRANSFER_COMMITTED"
DEFECTS = [
    defect("ring", RING, "#ifndef RING_DEFECT_NO_BOUNDS", "#ifdef RING_DEFECT_NO_BOUNDS", "no bound on requests", always=True),
    defect("ring", RING, "n > f->req_prod_pvt - f->rsp_cons", "n > f->nr_ents", "answers to what was not asked"),
    defect("ring", RING, "if (n > ring_front_free(f))", "if (n > f->nr_ents)", "requests over requests"),
    defect("ring", RING, "< (uint32_t)(new - old)", "<= (uint32_t)(new - old)", "an event too many"),
    defect("blk", BLK, "g->last > 7 ||", "g->last > 8 ||", "a sector behind the page", always=True),
    defect("blk", BLK, "(r->op == WRITE && !v->writable)", "0", "a write to what is read-only"),
    defect("blk", BLK, "v->address[g->gref] <= 1", "!v->address[g->gref]", "a grant that was refused"),
    defect("blk", BLK, "order[j]->at == end", "order[j]->at <= end", "neighbours that overlap"),
    defect("blk", BLK, "if (op == WRITE && overlap(order, n))", "if (0)", "the first of two writes holds"),
    defect("blk", BLK, "r->nr_segments > SEGMENTS || r->handle", "r->handle", "twelve segments"),
    defect("switch", SWITCH, "r->offset > PAGE - r->size ||", "", "a frame that leaves its page", always=True),
    defect("switch", SWITCH, "r->size > MAX_FRAME ||", "", "a frame longer than a buffer"),
    defect("switch", SWITCH, "if (memcmp(h + 6, v->mac, 6))", "if (0)", "another's address"),
    defect("switch", SWITCH, "return k->has_ports && in(", "return in(", "ports of what has none"),
    defect("switch", SWITCH, "ihl < 20 ||", "", "a header shorter than a header"),
    defect("net", NET, "r->id >= NET_RING || !n->rx_posted", "!n->rx_posted", "an id beyond the pool", always=True),
    defect("net", NET, "if (r->id >= NET_RING || !n->rx_posted[r->id] ||", "if (r->id >= NET_RING ||", "a buffer twice"),
    defect("net", NET, "(uint32_t)r->offset + (uint32_t)r->status > PAGE", "0", "a frame that leaves its page"),
    defect("net", NET, "done[i].id >= NET_RING || !n->tx_busy[done[i].id]", "done[i].id >= NET_RING", "a page twice"),
    defect("net", NET, "if (udp < 8 || ihl", "if (ihl", "less than nothing of a datagram"),
    defect("callring", EVTCHN, "port == 0 || port >= EVT_PORTS", "port == 0", "a port beyond all ports", always=True),
    defect("callring", CALLRING, "|| e->words[1] > UINT32_MAX ", "", "a port of 64 bits"),
    defect("callring", GUEST, "while (bits && n < max)", "while (bits)", "more ports than there is room for"),
    defect("callring", GUEST, "& ~atomic_load(&s->mask[word]);", ";", "an event that is masked"),
    defect("grant", GRANT, "op->len > PAGE - op->dest.offset", "0", "a copy over the end of a frame", always=True),
    defect("grant", GRANT, "if (writable && (flags & GTF_READONLY))", "if (0)", "a write to what is read-only"),
    defect("grant", GRANT, "        if (domid != caller)\n", "        if (0)\n", "a frame of another's, without a grant"),
    defect("grant", GRANT, IN_USE, "1", "somebody else's mark taken away"),
    defect("grant", GRANT, "if (writable && frame_get(m, mfn, 1))", "if (0)", "a copy into a page table", always=True),
    defect("grant", GRANT, "m->frames[mfn].owner != d->domid", "0", "a frame that was not the granter's"),
    defect("grant", GRANT, "        frame_put(m, s->mfn, 1);", "        ;", "a reference that a copy leaves"),
    defect("grant", FRAMES, "(f->count || f->done)", "f->count", "a copy into a page table that is being taken apart"),
    defect("grant", GRANT, ACCEPTED, "(atomic_load(entry_of(taker, ref)) & 0xffffffff)", "an entry read again"),
    defect("grant", GUEST, "if (seen & (8 | 16))", "if (seen & 8)", "an end while it is written"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), DEFECTS)
def test_defects_are_found(name: str, changes: Changes) -> None:
    assert not play(name, share(name, 1_000_000), changes).sound


REVERTED = {
    "blk/more-extents-than-segments": (BLK, "n == BLK_EXTENTS ||", "n == SEGMENTS ||"),
    "net/a-header-that-is-not-of-udp": (NET, "if (head_size && head_size != UDP_HEAD)", "if (head_size > UDP_HEAD)"),
    "net/one-ring-broken-the-other-goes-on": (NET, "    if (count < 0)\n        n->broken = 1;\n", ""),
}


@pytest.mark.parametrize("path", corpus(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_play_of_the_corpus_still_shows_what_it_showed(path: Path) -> None:
    """A target that is changed so that its old plays mean something else has to get new ones."""
    file, old, new = REVERTED[f"{path.parent.name}/{path.name}"]
    assert not replay(path, {file: [(old, new)]}).sound


def test_random_plays_do_where_there_is_no_libfuzzer() -> None:
    assert play("ring", 20_000, tool=CHECKED).sound
    bound = {RING: [("#ifndef RING_DEFECT_NO_BOUNDS", "#ifdef RING_DEFECT_NO_BOUNDS")]}
    assert not play("ring", 20_000, bound, tool=CHECKED).sound
