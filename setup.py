"""The C modules, and the library that a kernel maps into programs; all else about the distribution is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext


class Build(build_ext):
    """Beside the modules, what is C and is loaded by no Python."""

    def run(self) -> None:
        super().run()
        folder = Path(".") if self.inplace else Path(self.build_lib)
        runpy.run_path("domain/posix/build_vdso.py")["build"](folder / "domain/posix")


setup(
    cmdclass={"build_ext": Build},
    cffi_modules=[
        "ringlib/build_ring.py:ffibuilder",
        "hypervisor/gate/build_gate.py:ffibuilder",
        "hypervisor/build_hv.py:ffibuilder",
        "domain/build_guest.py:ffibuilder",
        "domain/build_net.py:ffibuilder",
        "dom0/build_blk.py:ffibuilder",
        "dom0/build_net.py:ffibuilder",
    ],
    # Always compiled: the headers that a module includes are not among the sources whose age setuptools compares.
    options={"build_ext": {"force": True, "parallel": 2}},
)
