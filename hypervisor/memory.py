"""Memory reservation: what a domain owns and may own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypervisor.dispatch import hypercall
from hypervisor.domain import Domain
from hypervisor.public import memory as abi

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor


@hypercall(abi.CurrentReservation)
def current_reservation(hv: Hypervisor, caller: Domain, call: abi.CurrentReservation) -> int:
    return len(hv.target(caller, call.domid).p2m)


@hypercall(abi.MaximumReservation)
def maximum_reservation(hv: Hypervisor, caller: Domain, call: abi.MaximumReservation) -> int:
    return hv.target(caller, call.domid).max_frames
