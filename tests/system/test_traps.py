"""The trap table's vector 0x80: the way of applications' system calls, installed once, and then nobody is asked."""

from __future__ import annotations

from collections.abc import Iterator
from errno import EINVAL, ENOENT

import pytest

from tests.system.machine import Guest, Machine
from tests.system.test_user import GETPID, LAB


@pytest.fixture
def lab(host: Machine) -> Iterator[Guest]:
    guest = host.guest("lab", memory=8)
    guest.do(LAB)
    yield guest
    guest.destroy()


def test_the_hypervisor_counts_none_either(lab: Guest) -> None:
    """Its own figures, of a few system calls and of a thousand more: what is asked from outside costs some of its own."""
    lab.do(f"""
        global p
        p = Program("{GETPID}")
        p.run()
    """)

    def counted() -> int:
        return int(lab.machine.ask("info", name=lab.name)["hypercalls"])

    def hypercalls(system_calls: int) -> int:
        before = counted()
        assert lab.do(f"return [p.run() for _ in range({system_calls})] == [0] * {system_calls}")
        return counted() - before

    hypercalls(1)
    few, many = hypercalls(1), hypercalls(1001)
    assert abs(many - few) < 10
    lab.do("p.end()")


def test_the_direct_path_is_installed_once_and_then_nobody_is_asked(lab: Guest) -> None:
    """No application before vector 0x80 has a fast handler; a bad one installs nothing; with it system calls are the
    kernel's own affair, also of those that run when it is forgotten."""
    out = lab.do(f"""
        from domain.traps import forget_traps, set_traps
        from hypervisor.public.errors import XenError
        from hypervisor.public.layout import HYPERVISOR_VIRT_START, KERNEL_WINDOW
        from hypervisor.public.traps import TI_DPL, TI_FAST, TI_MASK_EVENTS
        FAST, TOP, HANDLER = TI_FAST | TI_DPL, KERNEL_WINDOW + HYPERVISOR_VIRT_START, KERNEL_WINDOW + 0x100000
        kernel._users_ready = True  # the library would install it

        def born():
            try:
                return Program("{GETPID}")
            except XenError as error:
                return error.errno

        refused = []
        for address, vector, flags in (
            (TOP, 0x80, FAST), (1 << 47, 0x80, FAST), (HANDLER, 0x80, TI_DPL), (HANDLER, 0x80, TI_FAST),
            (HANDLER, 0x80, FAST | TI_MASK_EVENTS), (HANDLER, 0x81, FAST), (HANDLER, 14, FAST),
        ):
            try:
                set_traps(kernel, {{vector: address}}, flags)
            except XenError as error:
                refused.append([error.errno, born()])
        del kernel._users_ready
        p = born()
        first = p.run()
        forget_traps(kernel)
        before = kernel.hypercall.count
        kinds = {{p.run() for _ in range(1000)}}
        calls = kernel.hypercall.count - before
        late = born()
        p.end()
        return refused, first, sorted(kinds), p.user.traps, calls, late
    """)
    refused, first, kinds, arrived, calls, late = out
    assert refused == [[EINVAL, ENOENT]] * 7
    assert (first, kinds, arrived, calls, late) == (0, [0], 1002, 0, ENOENT)
