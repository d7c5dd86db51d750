"""ringlib: how two processes share memory. Xen's producer/consumer rings over POSIX shared memory; imports nothing of ours.

Interface: SharedRing (create, attach) for two processes of one user, with Slots of its payload and Statistics; FrontRing and
BackRing over memory that is mapped already; the errors Closed, Broken, Busy, WouldBlock. GUIDE.md shows them at work.
"""

from ringlib.ring import BackRing, Broken, Busy, Closed, FrontRing, RingError, WouldBlock
from ringlib.shared import SharedRing, Statistics
from ringlib.slots import Slots

__all__ = [
    "BackRing",
    "Broken",
    "Busy",
    "Closed",
    "FrontRing",
    "RingError",
    "SharedRing",
    "Slots",
    "Statistics",
    "WouldBlock",
]
