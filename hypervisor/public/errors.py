"""What a hypercall can answer: one class per status, the same on both sides of the boundary.

    XenError
      NotPermitted   EPERM   1   the caller may not do this, or not to that domain
      NoEntry        ENOENT  2   no such port, grant or record
      NoSuchDomain   ESRCH   3
      TooBig         E2BIG   7   more entries or bytes than the limit named
      TryAgain       EAGAIN 11   not yet: ask again (no call of this version answers it)
      NoMemory       ENOMEM 12   machine memory, or the maximum reservation
      BadAddress     EFAULT 14   an address that the caller has not mapped
      Busy           EBUSY  16   in use: a mapped grant, a pinned or still falling count
      Exists         EEXIST 17
      Invalid        EINVAL 22   a malformed, out-of-range or contradictory argument
      NoSpace        ENOSPC 28   no free port, handle or table entry
      NotImplementedCall ENOSYS 38   no such call or sub-operation

A guest's mistake is a status. A guest's violation of a shared structure ends that device or domain, with a reason.
Our own mistake is an AssertionError, and loud. Source: xen/include/public/errno.h.
"""

from __future__ import annotations

import errno
import os


class XenError(Exception):
    """A hypercall was refused; `errno` is the positive status number, `why` one sentence where the hypervisor has one."""

    errno: int = errno.EINVAL

    def __init__(self, why: str = "") -> None:
        super().__init__(why or os.strerror(self.errno))


class NotPermitted(XenError):
    errno = errno.EPERM


class NoEntry(XenError):
    errno = errno.ENOENT


class NoSuchDomain(XenError):
    errno = errno.ESRCH


class TooBig(XenError):
    errno = errno.E2BIG


class TryAgain(XenError):
    errno = errno.EAGAIN


class NoMemory(XenError):
    errno = errno.ENOMEM


class BadAddress(XenError):
    errno = errno.EFAULT


class Busy(XenError):
    errno = errno.EBUSY


class Exists(XenError):
    errno = errno.EEXIST


class Invalid(XenError):
    errno = errno.EINVAL


class NoSpace(XenError):
    errno = errno.ENOSPC


class NotImplementedCall(XenError):
    errno = errno.ENOSYS


BY_ERRNO: dict[int, type[XenError]] = {
    kind.errno: kind
    for kind in (
        NotPermitted, NoEntry, NoSuchDomain, TooBig, TryAgain, NoMemory, BadAddress,
        Busy, Exists, Invalid, NoSpace, NotImplementedCall,
    )
}  # fmt: skip


def from_status(status: int) -> XenError:
    """The error a guest raises for a reply's status (> 0)."""
    return BY_ERRNO.get(status, XenError)()
