"""Every exception that a domain can raise, by native code in real domains; bad tables, handlers, stacks and frames; callbacks.

exceptions_*.c has the cases, exceptions.py what they must say and die of. Seeded defects of the entry code itself are in
tests/hypervisor/gate/test_traps.py, which runs the same cases.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.native.build import HERE, build
from tests.native.exceptions import POWEROFF, REASONS, SAID, as_expected
from tests.native.paging_machine import run

COUNTED = ("every", "privileged", "arithmetic")
SEEDED = [  # a defect, a case, what it then says
    ("any handler", "handler-on-top", ["0"]),
    ("any handler", "table", None),
    ("double faults are bounced", "stack-code", []),
]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("exceptions", tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def ends(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    names = [*SAID, *REASONS]
    jobs = [{"kernel": str(kernel), "cmdline": f"case={name}"} for name in names]
    return dict(zip(names, run(jobs, tmp_path_factory.mktemp("state")), strict=True))


@pytest.mark.parametrize("name", SAID)
def test_an_exception_is_the_guests_own_affair(ends: dict[str, Any], name: str) -> None:
    end = ends[name]
    assert as_expected(name, end["said"]), end["said"]
    assert (end["reason"], end["exit_code"]) == (POWEROFF, 0)
    assert (end["lost"], end["dirty"]) == (0, 0), "frames"


@pytest.mark.parametrize("name", REASONS)
def test_what_cannot_be_delivered_ends_its_domain_with_a_reason(ends: dict[str, Any], name: str) -> None:
    end = ends[name]
    assert as_expected(name, end["said"]), end["said"]
    assert re.fullmatch(REASONS[name][1], end["reason"])
    assert (end["lost"], end["dirty"]) == (0, 0), "frames"


@pytest.mark.parametrize(("name", "lines"), [(name, len(SAID[name])) for name in COUNTED] + [("direct", 0)])
def test_exceptions_cost_no_call_no_message_and_no_batch(ends: dict[str, Any], name: str, lines: int) -> None:
    """One of each, and 100,000. Hypercalls, messages of page faults, when the monitor was last asked for something; each line
    that was said is a call, and so is the second look."""
    before, after = (look.split() for look in ends[name]["seen"])
    assert int(after[0]) - int(before[0]) == lines + 1
    assert after[1:] == before[1:]


def test_a_stack_without_its_page_costs_one_message(ends: dict[str, Any]) -> None:
    before, after = (look.split() for look in ends["stack-lost-page"]["seen"])
    assert int(after[1]) - int(before[1]) == 1


def test_every_case_is_expected() -> None:
    sources = "".join(path.read_text() for path in HERE.glob("exceptions_*.c"))
    assert set(re.findall(r'CASE\("([^"]+)"', sources)) == {*SAID, *REASONS, "bench"}


# ---- and would be seen


@pytest.fixture(scope="module")
def seeded(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    jobs = [{"kernel": str(kernel), "cmdline": f"case={name}", "defects": [defect]} for defect, name, _ in SEEDED]
    ends = run(jobs, tmp_path_factory.mktemp("state"))
    return {(defect, name): end for (defect, name, _), end in zip(SEEDED, ends, strict=True)}


@pytest.mark.parametrize(("defect", "name", "said"), SEEDED)
def test_without_its_check_it_would_be_seen(
    seeded: dict[tuple[str, str], Any], defect: str, name: str, said: list[str] | None
) -> None:
    end = seeded[defect, name]
    assert not as_expected(name, end["said"]) or not re.fullmatch(REASONS[name][1], end["reason"])
    assert said is None or end["said"] == said
