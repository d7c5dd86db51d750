"""The C modules; everything else about the distribution is in pyproject.toml."""

from setuptools import setup

setup(
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
