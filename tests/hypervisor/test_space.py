"""Where the host has no mapping left for unmapping a part of a window, everything is thrown out and the domain lives on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hypervisor.public.layout import KERNEL_PFN, virt
from hypervisor.public.mmu import EXT_OP, UPDATE, MmuextCommand, MmuextOp, MmuUpdate
from hypervisor.public.types import DOMID_SELF, PAGE_SIZE
from tests.models.stand_in import SCRATCH, StandIn


@pytest.fixture
def hv() -> Iterator[StandIn]:
    made = StandIn(nr_domains=2)
    yield made
    made.close()


def test_invlpg_is_counted_and_may_be_refused(hv: StandIn) -> None:
    """It splits a host mapping in two: of every other page of enough of them it used to end the domain."""
    domain, va = hv.domains[1], virt(KERNEL_PFN + 3)
    hv.write(domain, EXT_OP.pack(MmuextCommand.INVLPG, va, 0))
    before = domain.space.changes
    hv.done(domain, MmuextOp(SCRATCH, 1, 0, DOMID_SELF))
    assert domain.space.changes == before + 1 and va not in hv.spaces[1].pages
    out = hv.ask(domain, MmuextOp(SCRATCH, 1, 0, DOMID_SELF))
    hv.spaces[1].serve(fail_at=0)
    hv.serve_all()
    assert out == [1, None] and domain.alive, domain.reason
    hv.quiet()


def test_a_table_taken_out_of_the_root_shows_nothing_when_its_references_fall(hv: StandIn) -> None:
    """It is in no table any more when everything is thrown out."""
    domain = hv.domains[1]
    root = domain.space.root
    assert any(va < 1 << 30 for va in hv.spaces[1].pages)
    hv.write(domain, UPDATE.pack(root * PAGE_SIZE, 0))
    out = hv.ask(domain, MmuUpdate(SCRATCH, 1, 0, DOMID_SELF))
    hv.spaces[1].serve(fail_at=0)
    hv.serve_all()
    assert out == [1, None] and domain.alive, domain.reason
    assert not any(va < 1 << 30 for va in hv.spaces[1].pages)
    hv.quiet()
