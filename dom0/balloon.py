"""How much memory a domain has: the target, which its balloon driver follows, and the maximum, which the hypervisor enforces.

    ~/memory/static-max         KiB   what it was built for: its first page tables have room for no more
    ~/memory/target             KiB   what it should own
    ~/memory/current            KiB   where its driver stopped; the domain's word
    ~/control/feature-balloon   "1"   it has such a driver (domain/balloon.py); the domain's word

Xen's docs/misc/xenstore-paths.pandoc, but for `current`. What a domain owns in fact, the hypervisor counts.
"""

from __future__ import annotations

from typing import Any

from dom0.toolstack import Guest, Toolstack, ToolstackError
from hypervisor.public.domctl import DomainInfo, GetDomainInfo, SetMaxMem
from hypervisor.public.errors import XenError
from hypervisor.public.types import PAGE_SIZE

PAGE_KIB = PAGE_SIZE >> 10
DOM0_NAMES = ("dom0", "Domain-0", "0")


async def facts(tools: Toolstack, guest: Guest) -> dict[str, Any]:
    """What `mem-set --json` prints. Raises ToolstackError."""
    store, home = tools.kernel.store, f"/local/domain/{guest.domid}"
    try:
        info: DomainInfo = tools.kernel.call(GetDomainInfo(guest.domid))
    except XenError:
        raise ToolstackError(f"{guest.name} is ending") from None
    return {
        "name": guest.name,
        "domid": guest.domid,
        "state": info.state,
        "memory_kib": info.frames * PAGE_KIB,
        "target_kib": _number(await store.get(f"{home}/memory/target")),
        "maxmem_kib": info.max_frames * PAGE_KIB,
        "static_max_kib": guest.static_max * PAGE_KIB,
        "stopped_kib": _number(await store.get(f"{home}/memory/current")),
        "balloon": await store.get(f"{home}/control/feature-balloon") == "1",
    }


def _number(text: str) -> int:
    """-1 for what is none: a guest may write anything."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 15 else -1


def resizable(tools: Toolstack, name: str) -> Guest:
    """The domain, if its memory can change. Raises ToolstackError."""
    if name in DOM0_NAMES:
        raise ToolstackError("dom0 keeps the memory it has from the start: it serves the store and the consoles of all others")
    guest = tools.find(name)
    if guest.config is None:
        raise ToolstackError(f"{guest.name} is a driver domain: it keeps its memory, which the devices of all others need")
    return guest


async def set_target(tools: Toolstack, guest: Guest, kib: int) -> None:
    """What it should own from now on, in whole pages. Raises ToolstackError."""
    now = await facts(tools, guest)
    if kib > now["maxmem_kib"]:
        allow = f"first `ring1 mem-max {guest.name} {kib}k`" if kib <= now["static_max_kib"] else _too_late(guest)
        raise ToolstackError(f"{guest.name} may own at most {now['maxmem_kib']} KiB, {kib} KiB were asked for; {allow}")
    await _write_target(tools, guest, kib)


async def set_maximum(tools: Toolstack, guest: Guest, kib: int) -> None:
    """What it may own from now on; a target above comes down to it. Raises ToolstackError."""
    now = await facts(tools, guest)
    if kib > now["static_max_kib"]:
        room = f"{guest.name} has page tables for {now['static_max_kib']} KiB"
        raise ToolstackError(f"{room}, {kib} KiB were asked for; {_too_late(guest)}")
    if kib < now["memory_kib"]:
        shrink = f"first `ring1 mem-set {guest.name} {kib}k --wait`"
        raise ToolstackError(f"{guest.name} owns {now['memory_kib']} KiB, which nobody takes from it; {shrink}")
    tools.kernel.call(SetMaxMem(guest.domid, kib // PAGE_KIB))
    if now["target_kib"] > kib:
        await _write_target(tools, guest, kib)


async def _write_target(tools: Toolstack, guest: Guest, kib: int) -> None:
    await tools.kernel.store.write(f"/local/domain/{guest.domid}/memory/target", kib - kib % PAGE_KIB)


def _too_late(guest: Guest) -> str:
    return f"create {guest.name} again with a greater `maxmem` in its configuration"
