"""Build `hypervisor.gate._gate`: the declarations are read from gate.h, so that they are typed once."""

from __future__ import annotations

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

ffibuilder = FFI()
ffibuilder.cdef((HERE / "gate.h").read_text().split("/* cdef begin */")[1].split("/* cdef end */")[0])
ffibuilder.set_source(
    "hypervisor.gate._gate",
    '#include "gate.h"',
    sources=[os.path.relpath(HERE / f"{name}.c", ROOT) for name in ("fault", "gate", "stub", "traps")],
    include_dirs=[str(HERE), str(HERE.parent / "public")],
    define_macros=[("_CFFI_NO_LIMITED_API", None)],  # PyOS_BeforeFork and its kin are not in the limited API
    py_limited_api=False,
    # No stack protector, which Python's own flags turn on: it reads the thread's block, which is a guest's to move.
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-fno-stack-protector"],
)

if __name__ == "__main__":
    os.chdir(ROOT)
    ffibuilder.compile(tmpdir=str(ROOT))
