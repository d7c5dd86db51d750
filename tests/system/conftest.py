"""One host for the tests of a module, whose books must balance after each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.machine import Guest, Machine, until

WORK = """
    import zlib
    global rounds, wrong
    rounds = wrong = 0
    data = bytes(range(256)) * 256
    right = zlib.crc32(data)

    async def work():
        global rounds, wrong
        while True:
            pages = kernel.memory.alloc(16)
            memory.write(pages.address, data)
            version_ = kernel.call(version.XenVersion())
            await kernel.sleep(0.001)
            wrong += zlib.crc32(memory.read(pages.address, len(data))) != right or version_ != kernel.call(version.XenVersion())
            kernel.memory.free(pages)
            rounds += 1
    kernel.spawn(work())
"""


@pytest.fixture(scope="module")
def host() -> Iterator[Machine]:
    """A host for the module's tests. One that ends or replaces a process of the host itself takes `machine()`."""
    host = Machine()
    yield host
    host.close()


@pytest.fixture(autouse=True)
def balanced(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test made on the shared host is gone after it: frames, grants, ports, processes, queues, nodes, devices."""
    if "host" not in request.fixturenames:
        yield
        return
    host: Machine = request.getfixturevalue("host")
    before, there = host.books(), living(host)
    yield
    left = living(host) - there
    for name in left:  # what a failed test left is not the next one's
        host.ask("destroy", name=name)
    assert not left, f"domains left: {left}"
    assert not (off := host.balances(before)), f"off balance: {off}"


def living(host: Machine) -> set[str]:
    """Names of the domains that are not dead."""
    return {row["name"] for row in host.ask("list-domains") if row["state"] != "dead"}


# ---- for modules of attacks


@pytest.fixture(scope="module")
def bob(host: Machine) -> Iterator[Guest]:
    """The neighbour, at work."""
    guest = host.guest("bob", memory=2)
    guest.do(WORK)
    yield guest
    guest.destroy()


@pytest.fixture
def undisturbed(host: Machine, bob: Guest) -> Iterator[None]:
    """He is at work before and after, and all he read was right."""
    before, _ = bob.do("return rounds, wrong")
    yield
    assert until(lambda: bob.do("return rounds, wrong")[0] > before + 1)
    assert bob.do("return wrong") == 0


@pytest.fixture
def eve(host: Machine) -> Iterator[Guest]:
    """The attacker. A test may destroy her."""
    guest = host.guest("eve")
    yield guest
    if guest.row()["state"] != "dead":
        guest.destroy()
