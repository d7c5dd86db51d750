"""Every mover passes 2^32: indexes begin at 0xFFFFFF00, and thousands of entries get across, in order, with no wake-up lost."""

from __future__ import annotations

import subprocess

import pytest

from tests.conftest import TIMEOUT
from tests.models.mutant import Changes
from tests.proof.build import PLAIN, program
from tests.proof.test_fetch import OURS


def work(changes: Changes | None = None) -> subprocess.CompletedProcess[str]:
    path = program("wrap.c", OURS, PLAIN, changes)
    return subprocess.run([path], capture_output=True, text=True, timeout=TIMEOUT, check=False)


def test_every_mover_passes_the_end_of_its_indexes() -> None:
    done = work()
    assert (done.returncode, done.stderr) == (0, "")
    passed = {line.split()[0]: [int(n) for n in line.split()[1:]] for line in done.stdout.splitlines()}
    assert list(passed) == ["blk", "net", "callring", "bytes"]
    assert all(n >= 4000 for counts in passed.values() for n in counts)


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        pytest.param(
            "ringlib/ring.h",
            "(uint32_t)(new - atomic_load_explicit(event, memory_order_relaxed)) < (uint32_t)(new - old)",
            "old < *event && *event <= new",
            id="events compared as numbers",
        ),
        pytest.param(
            "ringlib/ring.h",
            "n = b->req_seen - b->req_cons;\n    }",
            "n = b->req_seen > b->req_cons ? b->req_seen - b->req_cons : 0;\n    }",
            id="requests compared as numbers",
        ),
        pytest.param(
            "ringlib/ring.h",
            "n = f->rsp_seen - f->rsp_cons;\n    }",
            "n = f->rsp_seen > f->rsp_cons ? f->rsp_seen - f->rsp_cons : 0;\n    }",
            id="responses compared as numbers",
        ),
        pytest.param(
            "ringlib/ring.c",
            "    if (n > p - c)\n        n = p - c;",
            "    if (p < c)\n        return 0;\n    if (n > p - c)\n        n = p - c;",
            id="bytes compared as numbers",
        ),
    ],
)
def test_indexes_that_are_taken_for_numbers_are_seen(path: str, old: str, new: str) -> None:
    done = work({path: [(old, new)]})
    assert done.returncode == 1 and "does not hold" in done.stderr
