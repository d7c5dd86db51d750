"""Build `domain._guest`; the declarations are read from guest.h, fast.h and spin.h."""

from __future__ import annotations

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

ffibuilder = FFI()
for header in (ROOT / "ringlib" / "spin.h", HERE / "guest.h", HERE / "posix" / "fast.h"):
    ffibuilder.cdef(header.read_text().split("/* cdef begin */")[1].split("/* cdef end */")[0])
ffibuilder.set_source(
    "domain._guest",
    '#include "guest.h"\n#include "posix/fast.h"',
    sources=[os.path.relpath(HERE / name, ROOT) for name in ("guest.c", "fault.c", "user.c", "posix/fast.c")],
    include_dirs=[str(HERE), str(ROOT / "ringlib"), str(ROOT / "hypervisor" / "public")],
    libraries=["rt"],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"],
)

if __name__ == "__main__":
    os.chdir(ROOT)
    ffibuilder.compile(tmpdir=str(ROOT))
