"""ring.h under clang's thread sanitizer: every access that the indexes do not order is a report.

gcc's does not do: it knows no fences, and says nothing where a publication is relaxed.
"""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.conftest import TIMEOUT
from tests.models.mutant import Changes
from tests.proof.build import THREADS, program

REQUESTS = 2_000_000
RACE = "WARNING: ThreadSanitizer: data race"

pytestmark = pytest.mark.skipif(bool(THREADS.missing), reason=f"{THREADS.missing}: apt-get install clang libclang-rt-14-dev")


def two_threads(requests: int, changes: Changes | None = None) -> subprocess.CompletedProcess[str]:
    """Run them; a sanitizer that finds no place in this process's address space is asked again, without randomization."""
    command = [str(program("tsan.c", [], THREADS, changes)), str(requests)]
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    for front in ([], [shutil.which("setarch") or "setarch", "-R"]):
        done = subprocess.run(
            [*front, *command], env=environment, capture_output=True, text=True, timeout=4 * TIMEOUT, check=False
        )
        if "unexpected memory mapping" not in done.stderr and "personality" not in done.stderr:
            return done
    pytest.skip("the thread sanitizer does not start on this host's layout of addresses")


def test_two_threads_do_not_race() -> None:
    done = two_threads(REQUESTS)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{REQUESTS} requests answered\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(
            "atomic_store_explicit(prod, new, memory_order_release)",
            "atomic_store_explicit(prod, new, memory_order_relaxed)",
            id="a relaxed publication",
        ),
        pytest.param(
            "b->req_seen = atomic_load_explicit(&b->sh->req_prod, memory_order_acquire)",
            "b->req_seen = atomic_load_explicit(&b->sh->req_prod, memory_order_relaxed)",
            id="a relaxed look at requests",
        ),
        pytest.param(
            "f->rsp_seen = atomic_load_explicit(&f->sh->rsp_prod, memory_order_acquire)",
            "f->rsp_seen = atomic_load_explicit(&f->sh->rsp_prod, memory_order_relaxed)",
            id="a relaxed look at responses",
        ),
    ],
)
def test_a_race_is_reported(old: str, new: str) -> None:
    done = two_threads(REQUESTS, {"ringlib/ring.h": [(old, new)]})
    assert done.returncode == 66 and RACE in done.stderr, done.stderr
