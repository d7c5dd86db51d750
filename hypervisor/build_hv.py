"""Build `hypervisor._hv`; the declarations are read from hv.h and spin.h."""

from __future__ import annotations

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

SOURCES = ("callring", "clock", "evtchn", "frames", "grant", "guest_access", "machine", "mmu", "segments", "tables")

ffibuilder = FFI()
for header in (ROOT / "ringlib" / "spin.h", HERE / "hv.h"):
    ffibuilder.cdef(header.read_text().split("/* cdef begin */")[1].split("/* cdef end */")[0])
ffibuilder.set_source(
    "hypervisor._hv",
    '#include "hv.h"',
    sources=[os.path.relpath(HERE / f"{name}.c", ROOT) for name in SOURCES],
    include_dirs=[str(HERE), str(ROOT / "ringlib")],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"],
)

if __name__ == "__main__":
    os.chdir(ROOT)
    ffibuilder.compile(tmpdir=str(ROOT))
