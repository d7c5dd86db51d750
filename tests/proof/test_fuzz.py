"""Structure-aware fuzzing of the C functions that read what a peer wrote, under the address and undefined-behaviour
sanitizers: plays of an honest peer with hostile moves in them, held to a model (fuzz.h).

libFuzzer where clang has it, else the same targets with random plays. RING1_NIGHTLY=1 runs twenty times as many.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import NIGHTLY, TIMEOUT
from tests.models.mutant import Changes
from tests.proof.build import CHECKED, FUZZER, program

# A million in all. The network frontend is not here: tests/proof/test_fetch.py questions it.
RUNS = {"fuzz_ring.c": 400_000, "fuzz_call.c": 200_000, "fuzz_switch.c": 200_000, "fuzz_blk.c": 200_000}
TIMES = 20 if NIGHTLY else 1
SEED = 1
LONGEST = 400  # bytes of a play
TARGETS = {
    "fuzz_ring.c": ["ringlib/ring.c"],
    "fuzz_blk.c": ["dom0/blk.c"],
    "fuzz_switch.c": ["dom0/switch.c"],
    "fuzz_call.c": ["hypervisor/callring.c", "hypervisor/evtchn.c", "hypervisor/grant.c"],
}
DEFECTS: dict[str, tuple[str, Changes]] = {
    "ring: no bound on requests": ("fuzz_ring.c", {"ringlib/ring.h": [("#ifndef RING_DEFECT_NO_BOUNDS", "#if 0")]}),
    "blk: a segment may leave its page": ("fuzz_blk.c", {"dom0/blk.c": [(" || g->last > 7", "")]}),
    "blk: a read-only disk is written": ("fuzz_blk.c", {"dom0/blk.c": [(" || (r->op == WRITE && !v->writable)", "")]}),
    "switch: a frame may leave its page": ("fuzz_switch.c", {"dom0/switch.c": [("r->offset > PAGE - r->size ||", "")]}),
    "call: any port may send": ("fuzz_call.c", {"hypervisor/evtchn.c": [("if (port == 0 || port >= EVT_PORTS)", "if (0)")]}),
    "call: a copy may leave its page": (
        "fuzz_call.c",
        {"hypervisor/grant.c": [("op->len > PAGE - op->source.offset || op->len > PAGE - op->dest.offset", "0")]},
    ),
}


def fuzz(target: str, where: Path, changes: Changes | None = None) -> subprocess.CompletedProcess[str]:
    runs = RUNS[target] * TIMES
    tool = CHECKED if FUZZER.missing else FUZZER
    sources = TARGETS[target] if tool is FUZZER else [*TARGETS[target], "tests/proof/generate.c"]
    path = str(program(target, sources, tool, changes))
    libfuzzer = [f"-runs={runs}", f"-seed={SEED}", f"-max_len={LONGEST}", f"-artifact_prefix={where}/", "-verbosity=0"]
    command = [path, *libfuzzer] if tool is FUZZER else [path, str(runs), str(SEED)]
    return subprocess.run(command, capture_output=True, text=True, timeout=(40 if NIGHTLY else 3) * TIMEOUT, check=False)


@pytest.mark.timeout(1500 if NIGHTLY else 120)
@pytest.mark.parametrize("target", TARGETS)
def test_no_play_gets_anywhere(target: str, tmp_path: Path) -> None:
    done = fuzz(target, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_seeded_defect_is_found(defect: str, tmp_path: Path) -> None:
    target, changes = DEFECTS[defect]
    done = fuzz(target, tmp_path, changes)
    assert done.returncode != 0, f"{RUNS[target]} plays did not find it"
