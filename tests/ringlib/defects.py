"""Seeded defects: ringlib's C, copied, mutated and built beside the real one, so that a check can be seen to fail."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cffi import FFI

import ringlib.bytering
import ringlib.door
import ringlib.ring
import ringlib.shared

ROOT = Path(__file__).resolve().parent.parent.parent
# What a check under a defect ends with: an assertion, a pytest.raises that nothing was raised in, or the ring's own word.
CAUGHT = (AssertionError, pytest.fail.Exception, ringlib.ring.RingError, TimeoutError)


class Edit(NamedTuple):
    """`old` stands in ringlib/`file` exactly once and becomes `new`."""

    file: str
    old: str
    new: str


def copy(folder: Path, *edits: Edit) -> Path:
    """ringlib's C and headers in `folder`, edited. A defect whose text is gone is an error: it would prove nothing."""
    for path in (ROOT / "ringlib").glob("[!_]*.[ch]"):
        shutil.copy(path, folder)
    for edit in edits:
        path = folder / edit.file
        assert path.read_text().count(edit.old) == 1, f"{edit.file} has not exactly one: {edit.old}"
        path.write_text(path.read_text().replace(edit.old, edit.new))
    return folder


def compiled(folder: Path, *arguments: str | Path) -> Path:
    """A shared object of C in `folder`."""
    out = folder / "built.so"
    flags = ["-std=gnu11", "-O2", "-Wall", "-shared", "-fPIC", "-pthread", f"-I{folder}", "-o", str(out)]
    subprocess.run(["gcc", *flags, *map(str, arguments)], check=True)
    return out


def seed(monkeypatch: pytest.MonkeyPatch, folder: Path, *edits: Edit, macros: tuple[str, ...] = ()) -> None:
    """Until the test ends, ringlib's Python stands on the mutated C."""
    copy(folder, *edits)
    ffi: Any = FFI()
    ffi.cdef((folder / "ringlib.h").read_text().split("/* cdef begin */")[1].split("/* cdef end */")[0])
    lib = ffi.dlopen(str(compiled(folder, *macros, folder / "ring.c", folder / "shared.c")))
    for module in (ringlib.ring, ringlib.bytering, ringlib.shared, ringlib.door):
        monkeypatch.setattr(module, "lib", lib)
        if hasattr(module, "ffi"):
            monkeypatch.setattr(module, "ffi", ffi)
