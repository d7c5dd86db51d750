"""Build `dom0._net`; the declarations are read from switch.h."""

from __future__ import annotations

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

ffibuilder = FFI()
ffibuilder.cdef((HERE / "switch.h").read_text().split("/* cdef begin */")[1].split("/* cdef end */")[0])
ffibuilder.set_source(
    "dom0._net",
    '#include "switch.h"',
    sources=[os.path.relpath(HERE / "switch.c", ROOT)],
    include_dirs=[str(HERE), str(ROOT / "ringlib")],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"],
)

if __name__ == "__main__":
    os.chdir(ROOT)
    ffibuilder.compile(tmpdir=str(ROOT))
