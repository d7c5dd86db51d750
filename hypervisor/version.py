"""xen_version."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypervisor.dispatch import hypercall
from hypervisor.domain import Domain
from hypervisor.public import version as abi
from hypervisor.public.types import PAGE_SIZE

if TYPE_CHECKING:
    from hypervisor.core import Hypervisor


VERSION = abi.ABI_MAJOR << 16 | abi.ABI_MINOR


@hypercall(abi.XenVersion)
def version(hv: Hypervisor, caller: Domain, call: abi.XenVersion) -> int:
    return VERSION


@hypercall(abi.XenExtraVersion)
def extraversion(hv: Hypervisor, caller: Domain, call: abi.XenExtraVersion) -> str:
    return "-ring1"


@hypercall(abi.XenPageSize)
def page_size(hv: Hypervisor, caller: Domain, call: abi.XenPageSize) -> int:
    return PAGE_SIZE
