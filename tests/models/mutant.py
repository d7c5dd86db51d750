"""Copies of our C with something changed, compiled on the spot: a seeded defect, or a guest that acts at the worst moment."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cffi import FFI

from tests.conftest import TIMEOUT

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-I", str(ROOT / "ringlib"), "-I", str(ROOT / "domain")]

Changes = Mapping[str, Iterable[tuple[str, str]]]  # file -> (old, new) pairs; old stands there once


def changed(path: str, changes: Iterable[tuple[str, str]]) -> str:
    text = (ROOT / path).read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{path} has {old!r} {text.count(old)} times"
        text = text.replace(old, new)
    return text


def compile_copies(out: Path, sources: Iterable[str], changes: Changes, flags: Iterable[str] = ()) -> Path:
    """`out` from copies of the sources, changed as told; headers of their own folders are the real ones."""
    copies, folders = [], set()
    for path in sources:
        copy = out.parent / f"{out.name}-{Path(path).name}"
        copy.write_text(changed(path, changes.get(path, ())))
        copies.append(str(copy))
        folders.add(str((ROOT / path).parent))
    assert set(changes) <= set(sources)
    includes = [f"-I{folder}" for folder in sorted(folders)]
    command = [os.environ.get("CC", "gcc"), *FLAGS, *includes, *flags, "-o", str(out), *copies]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    return out


def library(out: Path, header: str, sources: Iterable[str], changes: Changes) -> tuple[Any, Any]:
    """(ffi, lib) of a changed copy: the same declarations as the real module's."""
    ffi = FFI()
    ffi.cdef((ROOT / header).read_text().split("/* cdef begin */")[1].split("/* cdef end */")[0])
    compile_copies(out, sources, changes, ["-shared", "-fPIC", "-Wno-unused-parameter", "-Wno-unused-function"])
    return ffi, ffi.dlopen(str(out))
