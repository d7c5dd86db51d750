"""Version and features. Source: xen/include/public/version.h."""

from __future__ import annotations

from hypervisor.public.hypercall import OP_MULTICALL, OP_XEN_VERSION, Hypercall
from hypervisor.public.types import U32, U64

ABI_MAJOR = 0
ABI_MINOR = 1


class XenVersion(Hypercall[int]):
    """ABI version, major << 16 | minor."""

    OP, CMD = OP_XEN_VERSION, 0


class XenExtraVersion(Hypercall[str]):
    """Text after the numbers."""

    OP, CMD = OP_XEN_VERSION, 1


class XenPageSize(Hypercall[int]):
    """Bytes of a page: 4096."""

    OP, CMD = OP_XEN_VERSION, 7


class Multicall(Hypercall[None]):
    """Run `count` calls of the 64-byte entries at guest-virtual `address`, in order, each with its own result.

    Entry: u64 op, s64 result OUT (the value, or minus the status), six u64 words: the sub-operation where the op has one,
    then the fields; unused words are 0. A failing entry does not stop the list. A nested multicall answers -EINVAL, a call
    with text or bytes -EINVAL, and privilege is checked for each. The list is read once before the first entry runs, and
    written back after the last. Raises BadAddress (nothing was run), TooBig.
    """

    OP = OP_MULTICALL
    address: U64
    count: U32
