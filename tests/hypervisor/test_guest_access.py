"""Copies to and from a guest's memory: over pages that do not lie together, all or nothing, and never past a space's end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hypervisor import guest_access
from hypervisor.domain import Domain
from hypervisor.public.errors import BadAddress
from hypervisor.public.layout import KERNEL_PFN, NR_WINDOWS, SHARED_INFO, SPACE_BYTES, virt
from hypervisor.public.mmu import Pte
from hypervisor.public.types import PAGE_SIZE
from tests.models.stand_in import DATA_FRAMES, StandIn

FIRST = virt(KERNEL_PFN)
READ_ONLY = int(Pte.PRESENT | Pte.US)


@pytest.fixture
def guest() -> Iterator[tuple[StandIn, Domain]]:
    """Its second page shows the frame of the fourth and the other way round: neighbours here, not in the machine."""
    hv = StandIn(nr_domains=2)
    domain = hv.domains[1]
    second, fourth = (domain.mfn_list[KERNEL_PFN + i] for i in (1, 3))
    hv.show(domain, KERNEL_PFN + 1, fourth)
    hv.show(domain, KERNEL_PFN + 3, second)
    yield hv, domain
    hv.close()


@pytest.mark.parametrize("offset", [0, 1, PAGE_SIZE - 1, PAGE_SIZE])
@pytest.mark.parametrize("size", [0, 1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 4 * PAGE_SIZE])
def test_what_is_written_is_read_and_nothing_beside_it(guest: tuple[StandIn, Domain], offset: int, size: int) -> None:
    hv, domain = guest
    whole, data = bytearray(b"\xee" * DATA_FRAMES * PAGE_SIZE), bytes(i * 7 & 0xFF for i in range(size))
    guest_access.copy_out(hv, domain, FIRST, whole)
    guest_access.copy_out(hv, domain, FIRST + offset, data)
    whole[offset : offset + size] = data
    assert guest_access.copy_in(hv, domain, FIRST + offset, size) == data
    assert guest_access.copy_in(hv, domain, FIRST, len(whole)) == whole
    pages = [hv.machine.read(domain.mfn_list[KERNEL_PFN + i], 0, PAGE_SIZE) for i in (0, 3, 2, 1)]
    assert b"".join(pages) == whole[: 4 * PAGE_SIZE]


def test_a_page_that_may_not_be_written_keeps_all_of_it_from_being_written(guest: tuple[StandIn, Domain]) -> None:
    hv, domain = guest
    hv.show(domain, KERNEL_PFN + 2, domain.mfn_list[KERNEL_PFN + 2], READ_ONLY)
    before = guest_access.copy_in(hv, domain, FIRST, 3 * PAGE_SIZE)
    with pytest.raises(BadAddress):
        guest_access.copy_out(hv, domain, FIRST + 8, b"x" * (2 * PAGE_SIZE))
    assert guest_access.copy_in(hv, domain, FIRST, 3 * PAGE_SIZE) == before
    guest_access.copy_out(hv, domain, FIRST + 8, b"x" * (2 * PAGE_SIZE - 8))


def test_a_page_that_is_absent_is_neither_read_nor_written(guest: tuple[StandIn, Domain]) -> None:
    hv, domain = guest
    hv.hide(domain, KERNEL_PFN + 1)
    for call in (lambda: guest_access.copy_in(hv, domain, FIRST, PAGE_SIZE + 1),
                 lambda: guest_access.copy_out(hv, domain, FIRST, bytes(PAGE_SIZE + 1))):  # fmt: skip
        with pytest.raises(BadAddress):
            call()
    assert len(guest_access.copy_in(hv, domain, FIRST, PAGE_SIZE)) == PAGE_SIZE


@pytest.mark.parametrize("address", [SHARED_INFO, SPACE_BYTES - 1, SPACE_BYTES, NR_WINDOWS * SPACE_BYTES, (1 << 64) - 1])
def test_no_address_outside_its_tables_is_a_guests(guest: tuple[StandIn, Domain], address: int) -> None:
    hv, domain = guest
    for size in (1, PAGE_SIZE, 2 * PAGE_SIZE):
        with pytest.raises(BadAddress):
            guest_access.copy_in(hv, domain, address, size)
        with pytest.raises(BadAddress):
            guest_access.copy_out(hv, domain, address, bytes(size))
