"""Every way to a writable page table that we could think of, tried by native code on the real hypervisor; each is refused, and
the store at its end faults. With the check that refuses it left out, the same store is seen to succeed.

What an attack says: a number for each call (what it answers, or minus its error), "faulted" or "ALLOWED" for each store that
must not succeed, "unchanged" or "CHANGED" for each look at a table. paging_*.c says what they are of.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NIGHTLY
from tests.native.build import HERE, build
from tests.native.paging_defects import DEFECTS
from tests.native.paging_machine import run

RACES = 3000 if NIGHTLY else 300

ATTACKS = {
    # entries: EINVAL for a frame of another type, of another owner, of nobody; EBUSY for a second parent; EPERM for a slot
    "entry-l1": "-22 faulted",
    "entry-l2": "-22 faulted",
    "entry-l3": "-22 faulted",
    "entry-gdt": "-22 faulted",
    "entry-boot-root": "-22 faulted",
    "entry-boot-l2": "-22 faulted",
    "entry-boot-l1": "-22 faulted",
    "va-mapping": "-22 faulted",
    "preserve-ad": "-22 faulted 1 -22 faulted",
    "itself-l1": "-22 faulted faulted",
    "itself-l1-readonly": "1 faulted faulted",
    "itself-l2": "-22 faulted faulted",
    "itself-l3": "-22 faulted faulted",
    "linear": "-22 -22 -22 -22 -22 faulted faulted",
    "second-parent": "-16 -16 faulted faulted faulted",
    "upper-rights": "0 faulted 1 1 1 faulted 1 1 1 faulted",
    "bits": "-22 -22 -22 -22 -22 -22 -22 faulted faulted",
    "foreign": "1 -22 faulted -22 faulted",
    "free": "1 -22 faulted -22 faulted",
    "range": "1 -22 faulted -22 faulted",
    "far-range": "1 -22 faulted -22 faulted",
    "slots": "-1 -1 1 -1 -1 1 1 -1 faulted faulted faulted",
    "pages": "faulted faulted faulted faulted faulted faulted faulted faulted",
    "plain-store": "-22 -1 -22 -22 1 -22 faulted faulted",
    # stores that are requests: done (1) where mmu_update would; of a message by hand the verdict: 2 done, 1 bounced, 0 mapped
    "store-opted": "faulted 0 1 there 0 faulted -22 -22",
    "store-followed": "0 4 1 5 1 faulted 1 faulted",
    "store-refused": "0 faulted faulted faulted faulted faulted faulted unchanged unchanged",
    "store-no-entry": "1 0 faulted faulted unchanged unchanged",
    "store-forged": "0 1 1 1 0 0 1 unchanged unchanged 2 there",
    "store-others-table": "0 0 faulted",
    # pins: EINVAL while anything can write the frame
    "pin-here": "1 -22 1 1 faulted 1 1 -22 1 1 faulted",
    "pin-elsewhere": "1 1 -22 1 1 faulted faulted",
    "pin-not-current": "1 1 -22 1 1 faulted faulted",
    "pin-twice": "1 2 1 -22 1 1 faulted faulted",
    "pin-in-list": "-14 2 2 -22 faulted",
    "pin-held": "0 1 -22 faulted 1 -22 faulted 1 -22 faulted 1 0",
    "pin-not-ours": "-22 -22 -22 -22 -22 -22 -22 -22 -22 -22 faulted faulted faulted",
    "retype": "1 0 0 1 -22 faulted",
    "retype-batch": "1 2 1 faulted faulted",
    "tree-root": "-22 1 1 1 1 faulted faulted faulted faulted",
    "tree-l2": "-22 1 -22 1 1 faulted faulted faulted faulted",
    "tree-l1": "-22 -22 -22 1 1 faulted faulted faulted faulted",
    "unpin-root": "1 1 faulted 1 1 faulted 1 1",
    "unpin-current-root": "1 1 faulted 1 1 faulted 1 1",
    "many-roots": "0 1 1" + 19 * " 1" + 16 * " faulted",
    "evicted-root": "1 1 1 1 1 faulted",
    "race": "0 0 faulted",
    # frames that leave, and answers: EFAULT where the tables do not let the caller write
    "decrease": "0 faulted 1 0 1 0 1 0 1 1 faulted -22 0 0",
    "exchange": "1 -22 1 -14 unchanged 1 faulted -22 1 1 -22 faulted",
    "balloon": "1 1 1 1 1 1 faulted faulted unchanged",
    "fill-page": "-22 -22 -22 -22 -22 -22 unchanged unchanged faulted faulted",
    "answers": 14 * "-14 " + "-1 -1 unchanged faulted",
    "answers-elsewhere": 9 * "-14 " + "faulted faulted",
    # grants: GNTST_permission_denied -8, bad_page -9, bad_copy_arg -10
    "grant-table": "-8 faulted 0 faulted",
    "grant-readonly": "-8 0 faulted",
    "grant-own-table": "-8 faulted 0 1 1 -22 0 1 faulted faulted",
    "grant-copy": "-8 -8 -8 -10 -8 unchanged faulted",
    "grant-unmapped": "0 1 0 faulted -22",
    "transfer": "-9 1 -9 1 -9 1 0 faulted -22 faulted",
    "granter-dies": "0 1 0 1 0 faulted",
}
SEEDED = [  # a defect, and what it lets through
    ("entries are not counted", "entry-l1", "ALLOWED"),
    ("anybody's frames", "foreign", "ALLOWED"),
    ("anybody's frames", "free", "ALLOWED"),
    ("an entry's own rights", "upper-rights", "ALLOWED"),
    ("a table of any frame", "pin-here", "ALLOWED"),
    ("a table of any frame", "pin-elsewhere", "ALLOWED"),
    ("the host does not follow", "retype", "ALLOWED"),
    ("the host does not follow", "pin-twice", "ALLOWED"),
    ("copies into tables", "grant-copy", "CHANGED"),
    ("results into tables", "exchange", "CHANGED"),
    ("a lost window stays", "evicted-root", "ALLOWED"),
    ("a lost window stays", "unpin-root", "ALLOWED"),
    ("a lost table stays", "upper-rights", "ALLOWED"),
    ("grants of tables", "grant-table", "ALLOWED"),
    ("grants of tables", "grant-own-table", "ALLOWED"),
    ("mapped frames leave", "decrease", "ALLOWED"),
    ("any page is a table", "store-no-entry", "ALLOWED"),
    ("anybody's frames", "store-refused", "ALLOWED"),
    ("entries are not counted", "store-refused", "ALLOWED"),
    ("held frames are not counted", "pin-held", "CHANGED"),
    ("a dead domain's frames stay", "granter-dies", "ALLOWED"),
    ("a dead domain's frames stay", "grant-unmapped", "ALLOWED"),
    ("descriptors are not counted", "entry-gdt", "ALLOWED"),
    ("no acknowledgement", "race", "ALLOWED"),
]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("paging", tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def ends(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    jobs = [{"kernel": str(kernel), "cmdline": f"attack={name} rounds={RACES}"} for name in ATTACKS]
    return dict(zip(ATTACKS, run(jobs, tmp_path_factory.mktemp("state")), strict=True))


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused(ends: dict[str, Any], name: str) -> None:
    end = ends[name]
    assert end["said"] == [ATTACKS[name]]
    assert (end["reason"], end["exit_code"]) == ("poweroff", 0)
    assert (end["lost"], end["dirty"]) == (0, 0), "frames"


def test_a_dead_granters_frame_is_not_stored_to(ends: dict[str, Any]) -> None:
    assert ends["granter-dies"]["seen"] == ["gone", "owner 0xffff, zeros"]


def test_every_attack_is_expected() -> None:
    sources = "".join(path.read_text() for path in HERE.glob("paging_*.c"))
    names = {name for name in re.findall(r'ATTACK\("([^"]+)"', sources) if not name.startswith("hammer-")}
    assert names == set(ATTACKS)
    assert not [name for name, said in ATTACKS.items() if "ALLOWED" in said or "CHANGED" in said]


# ---- and would be seen to succeed


@pytest.fixture(scope="module")
def seeded(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    jobs = [
        {"kernel": str(kernel), "cmdline": f"attack={name} rounds=100", "defects": [defect]} for defect, name, _ in SEEDED
    ]
    ends = run(jobs, tmp_path_factory.mktemp("state"))
    return {(defect, name): end for (defect, name, _), end in zip(SEEDED, ends, strict=True)}


@pytest.mark.parametrize(("defect", "name", "what"), SEEDED)
def test_without_its_check_an_attack_succeeds(
    seeded: dict[tuple[str, str], Any], defect: str, name: str, what: str
) -> None:
    (said,) = seeded[defect, name]["said"]
    assert what in said.split()


def test_without_zeros_in_its_place_a_dead_domains_frame_is_stored_to(seeded: dict[tuple[str, str], Any]) -> None:
    assert seeded["a dead domain's frames stay", "granter-dies"]["seen"] == ["gone", "owner 0xffff, CHANGED"]


def test_every_defect_is_seen() -> None:
    elsewhere = {"a patient deadline", "nothing is charged", "any handler", "double faults are bounced"}
    assert {defect for defect, _, _ in SEEDED} | elsewhere == set(DEFECTS)
