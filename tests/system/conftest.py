"""One host for the tests of a module, whose books must balance after each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.machine import Machine


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
    before = host.books()
    yield
    for row in host.ask("list-domains"):  # what a failed test left is not the next one's
        if row["name"] not in ("dom0", "blkback", "netback") and row["state"] != "dead":
            host.ask("destroy", name=row["name"])
            left = row["name"]
            assert left is None, f"the test left domain {left}"
    assert not (off := host.balances(before)), f"off balance: {off}"
