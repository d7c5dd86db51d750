"""Everything of ours that reads what a peer may write reads it once, and acts on what it judged.

fetch.c runs each function over memory that traps, alone and against an attacker who changes every byte right after its first
read. Here it is run, and shown what it must find: each place that could read a second time, made to.
"""

from __future__ import annotations

import subprocess
from typing import NamedTuple

import pytest

from tests.conftest import TIMEOUT
from tests.models.mutant import Changes
from tests.proof.build import TRAPPED, program

OURS = [
    "ringlib/ring.c",
    "domain/guest.c",
    "domain/net.c",
    "dom0/blk.c",
    "dom0/switch.c",
    "hypervisor/callring.c",
    "hypervisor/evtchn.c",
    "hypervisor/frames.c",
    "hypervisor/grant.c",
]
CASES = "ring_back ring_front bytes blk switch net callring callring_round event grant_claim grant_copy".split()


class Seen(NamedTuple):
    """Of one case: bytes read of a peer's memory, those read again, and whether the attack changed what came out."""

    reads: int
    twice: int
    attacked: bool


def watch(changes: Changes | None = None, *cases: str) -> dict[str, Seen]:
    """What each of these cases did, or every one."""
    path = program("fetch.c", OURS, TRAPPED, changes)
    done = subprocess.run([path, *cases], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    return {name: Seen(int(reads), int(twice), attack == "1") for name, reads, twice, attack in rows}


def test_nothing_is_read_twice_and_no_attack_makes_a_difference() -> None:
    seen = watch()
    assert list(seen) == CASES
    assert all(case.reads >= 8 for case in seen.values()), seen
    assert not {name: case for name, case in seen.items() if case.twice or case.attacked}


def slot(ring: str, index: str, size: int) -> str:
    return f"ring_slot({ring}->sh, {index}, {ring}->nr_ents, {size})"


SECOND_LOOKS = [
    pytest.param(
        "ring_back",
        "ringlib/ring.h",
        "    if (n > max)\n        n = max;\n    ring_copy_out(b->sh,",
        "    n = atomic_load(&b->sh->req_prod) - b->req_cons;\n    if (n > max)\n        n = max;\n    ring_copy_out(b->sh,",
        id="requests counted again after the check",
    ),
    pytest.param(
        "ring_front",
        "ringlib/ring.h",
        "    if (n > max)\n        n = max;\n    ring_copy_out(f->sh,",
        "    n = atomic_load(&f->sh->rsp_prod) - f->rsp_cons;\n    if (n > max)\n        n = max;\n    ring_copy_out(f->sh,",
        id="responses counted again after the check",
    ),
    pytest.param(
        "bytes",
        "ringlib/ring.c",
        "    part = size - (c & (size - 1));",
        "    if (n == p - c)\n        n = atomic_load((_Atomic uint32_t *)prod) - c;\n    part = size - (c & (size - 1));",
        id="bytes counted again after the check",
    ),
    pytest.param(
        "blk",
        "dom0/blk.c",
        "const struct request *r = (const struct request *)v->batch + index;",
        "const struct ring_back *b = (const struct ring_back *)v->ring;\n    const struct request *r = (const struct request *)"
        + slot("b", "b->req_cons - v->taken + index", 112)
        + ";",
        id="a block request that stays in the ring",
    ),
    pytest.param(
        "switch",
        "dom0/switch.c",
        "deliver(sw, d, header, copied, frame + copied, r->size);",
        "deliver(sw, d, frame, copied, frame + copied, r->size);",
        id="a header judged here and delivered from there",
    ),
    pytest.param(
        "net",
        "domain/net.c",
        "const struct rx_response *r = &got[i];",
        "const struct rx_response *r = (const void *)"
        + slot("rx_of(n)", "rx_of(n)->rsp_cons - (uint32_t)count + (uint32_t)i", 8)
        + ";",
        id="a response that stays in the ring",
    ),
    pytest.param(
        "callring",
        "hypervisor/callring.c",
        "const struct entry *e = (const struct entry *)c->entries + c->next;",
        "const struct entry *e = (const void *)" + slot("ring_of(c)", "ring_of(c)->req_cons - c->taken + c->next", 64) + ";",
        id="a hypercall that stays in the ring",
    ),
]


@pytest.mark.parametrize(("case", "path", "old", "new"), SECOND_LOOKS)
def test_a_second_look_is_seen_and_can_be_attacked(case: str, path: str, old: str, new: str) -> None:
    seen = watch({path: [(old, new)]}, case)[case]
    assert seen.twice and seen.attacked


LATE = "            *frame = (uint32_t)(seen >> 32);\n            *before"


def test_a_frame_from_before_the_exchange_is_attacked() -> None:
    """No byte is read twice here: only who is attacked sees it."""
    first = "    seen = atomic_load(entry);\n    for (int tries"
    early = first.replace("    for", "    *frame = (uint32_t)(seen >> 32);\n    for")
    changes = {"hypervisor/grant.c": [(first, early), (LATE, "            *before")]}
    seen = watch(changes, "grant_claim")["grant_claim"]
    assert seen.attacked and not seen.twice


def test_a_frame_from_after_the_exchange_is_seen() -> None:
    """An attacker who is in time for it is in time for the exchange too, which then fails: only who counts sees it."""
    seen = watch({"hypervisor/grant.c": [(LATE, LATE.replace("seen", "atomic_load(entry)"))]}, "grant_claim")
    assert seen["grant_claim"].twice


def test_an_event_word_that_is_read_twice_is_seen() -> None:
    once = "return !(atomic_load(&s->mask[port / 64]) & bit);"
    twice = once.replace(" & bit)", " & atomic_load(&s->mask[port / 64]) & bit)")
    assert watch({"hypervisor/evtchn.c": [(once, twice)]}, "event")["event"].twice
