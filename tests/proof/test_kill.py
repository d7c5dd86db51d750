"""SIGKILL after any instruction of push, take, respond and final check: whoever is left finds nothing half done.

kill.c says what that means; here it is run, and shown rings that publish before they fill.
"""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.conftest import NIGHTLY, TIMEOUT
from tests.models.mutant import Changes
from tests.proof.build import PLAIN, program

EVERY = 1 if NIGHTLY else 3  # instructions
FEWEST = 150 // EVERY  # points of any side; fewer, and it was not run


def kill(side: str, every: int, changes: Changes | None = None) -> tuple[int, int, str]:
    """Points at which a child was killed, violations that were found, and the first."""
    path = program("kill.c", ["ringlib/ring.c", "ringlib/shared.c"], PLAIN, changes)
    done = subprocess.run([path, side, str(every)], capture_output=True, text=True, timeout=4 * TIMEOUT, check=False)
    if done.returncode == 77:
        pytest.skip("this host refuses ptrace")
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"(\d+) points, (\d+) violations(?:: (.*))?\n", done.stdout)
    assert found, done.stdout
    return int(found[1]), int(found[2]), found[3] or ""


@pytest.mark.parametrize("side", ["front", "back", "writer", "reader", "answerer"])
def test_killed_at_any_instruction(side: str) -> None:
    points, violations, first = kill(side, EVERY)
    assert violations == 0, first
    assert points >= FEWEST


FRONT_COPY = "    ring_copy_in(f->sh, old, f->nr_ents, f->slot_size, requests, f->req_size, n);\n"
FRONT_REST = "    f->req_prod_pvt = old + n;\n    return ring_push(&f->sh->req_prod, &f->sh->req_event, old, old + n);\n"
BACK_COPY = "    ring_copy_in(b->sh, old, b->nr_ents, b->slot_size, responses, b->rsp_size, n);\n"
BACK_REST = "    b->rsp_prod_pvt = old + n;\n    return ring_push(&b->sh->rsp_prod, &b->sh->rsp_event, old, old + n);\n"
WRITE_COPY = (
    "    memcpy((char *)buffer + (p & (size - 1)), data, part);\n    memcpy(buffer, (const char *)data + part, n - part);\n"
)
WRITE_STORE = "    atomic_store((_Atomic uint32_t *)prod, p + n);\n"


def late(copy: str, rest: str) -> tuple[str, str]:
    """Publish first, fill afterwards."""
    return copy + rest, rest.replace("return", "int32_t r =") + copy + ("    return r;\n" if "return" in rest else "")


@pytest.mark.parametrize(
    ("side", "changes", "says"),
    [
        ("front", {"ringlib/ring.h": [late(FRONT_COPY, FRONT_REST)]}, "a request that is not whole"),
        ("back", {"ringlib/ring.h": [late(BACK_COPY, BACK_REST)]}, "a response that is not whole"),
        ("answerer", {"ringlib/shared.c": [("        keep(s, n);\n", "")]}, "a request that is not whole"),
        ("writer", {"ringlib/ring.c": [late(WRITE_COPY, WRITE_STORE)]}, "a byte that was not written"),
    ],
)
def test_publishing_before_filling_or_writing_over_what_is_needed_is_seen(side: str, changes: Changes, says: str) -> None:
    _, violations, first = kill(side, 3, changes)
    assert violations and says in first
