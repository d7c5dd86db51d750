"""A domain that ends while dom0 fills its tables."""

from __future__ import annotations

import struct

from domain.callring import packed
from hypervisor.public.boot_tables import UPPER
from hypervisor.public.errors import NoSuchDomain
from hypervisor.public.layout import KERNEL_PFN
from hypervisor.public.mmu import EXT_OP, MmuextCommand, MmuextOp, entry
from hypervisor.public.version import Multicall, XenVersion
from tests.models.stand_in import SCRATCH, StandIn


def test_its_end_is_an_error_of_that_call_alone() -> None:
    """In a list of calls: it used to be the end of the whole list, without a result of any entry."""
    hv = StandIn(nr_frames=1024, nr_domains=1)
    domain, dom0 = hv.add(1, 300), hv.domains[0]
    pfns = range(KERNEL_PFN + 1, KERNEL_PFN + 202)
    hv.hide(domain, *pfns)
    l2, *l1s = (domain.mfn_list[pfn] for pfn in pfns)
    hv.machine.write(l2, 0, struct.pack("<200Q", *(entry(l1, UPPER) for l1 in l1s)))
    domain.state = "paused"

    hv.write(dom0, EXT_OP.pack(MmuextCommand.PIN_L2, l2, 0))
    hv.write(dom0, packed(MmuextOp(SCRATCH, 1, 0, 1)) + packed(XenVersion()), SCRATCH + 1024)
    out = hv.ask(dom0, Multicall(SCRATCH + 1024, 2))
    assert not out
    hv.kill(1)
    while not out or domain.state != "dead":
        hv.settle()
    assert out[1] is None, out
    results = struct.unpack("<Qq6QQq6Q", hv.read(dom0, 128, SCRATCH + 1024))[1::8]
    assert results[0] == -NoSuchDomain.errno and results[1] > 0
    hv.quiet()
    hv.close()
