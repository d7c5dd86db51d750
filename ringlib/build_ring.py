"""Build `ringlib._ring`; the declarations are read from ringlib.h and spin.h."""

from __future__ import annotations

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

ffibuilder = FFI()
for header in (HERE / "spin.h", HERE / "ringlib.h"):
    ffibuilder.cdef(header.read_text().split("/* cdef begin */")[1].split("/* cdef end */")[0])
ffibuilder.set_source(
    "ringlib._ring",
    '#include "ringlib.h"',
    sources=[os.path.relpath(HERE / name, ROOT) for name in ("ring.c", "shared.c")],
    include_dirs=[str(HERE)],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"],
)

if __name__ == "__main__":
    os.chdir(ROOT)
    ffibuilder.compile(tmpdir=str(ROOT))
