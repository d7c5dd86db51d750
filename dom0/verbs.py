"""What can be asked over the control socket: one function a verb, arguments as the request names them.

Answers are plain values. A refusal is a ToolstackError with the command's exit code.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Awaitable, Callable
from typing import Any

from dom0 import balloon, clock, config, cpus, firewall
from dom0.toolstack import Toolstack, ToolstackError, row
from domain.sched import TimeoutExpired, timeout
from domain.store import StoreError
from hypervisor.public.domctl import CreateFlags, DomainInfo, GetDomainInfo
from hypervisor.public.errors import XenError
from hypervisor.public.sched import ShutdownReason
from hypervisor.public.scheduler import MAX_CAP, MAX_WARP_US, MAX_WEIGHT
from hypervisor.public.sysctl import Ledger, PhysInfo, ProcessMemory, ReadConsole
from hypervisor.public.types import DOMID_SELF

Verb = Callable[..., Awaitable[Any]]
TABLE: dict[str, Verb] = {}
FIREWALL_SECONDS = 5.0
DIGEST_BYTES = 1 << 20
PARAMS = f"weight is 1 to {MAX_WEIGHT}, cap 0 to {MAX_CAP} percent, a time of warp 0 to {MAX_WARP_US} us"


def verb(function: Verb) -> Verb:
    """Answer to the function's name, underscores as dashes."""
    TABLE[function.__name__.replace("_", "-")] = function
    return function


@verb
async def hello(tools: Toolstack) -> dict[str, Any]:
    """Who is there."""
    return {"pid": os.getpid(), "hypervisor_pid": tools.ask(PhysInfo)["pid"]}


@verb
async def create(tools: Toolstack, tree: Any, paused: bool = False, unfiltered: bool = False) -> dict[str, Any]:
    """From a configuration as plain maps and lists, with absolute paths. `unfiltered`: the self-test's seeded hole."""
    guest = await tools.create(config.from_tree(tree), paused, CreateFlags.UNFILTERED if unfiltered else CreateFlags.NONE)
    return {"domid": guest.domid, "name": guest.name}


@verb
async def list_domains(tools: Toolstack) -> list[dict[str, Any]]:
    return tools.rows()


@verb
async def info(tools: Toolstack, name: str) -> dict[str, Any]:
    """One domain: the row of `list`, the hypervisor's counters, its devices and their counters."""
    guest = tools.find(name, alive=False)
    try:
        facts: DomainInfo | None = tools.kernel.call(GetDomainInfo(guest.domid)) if not guest.ended.is_set else guest.info
    except XenError:
        facts = guest.info
    if facts is None:
        raise ToolstackError(f"{name} is ending")
    devices = [{"kind": d.kind, "handle": d.handle, "backend": d.backend} for d in tools.devices.of(guest.domid)]
    counters = [r for r in tools.drivers.statistics() if r["domid"] == guest.domid]
    out = {**row(facts, guest.trouble), **facts._asdict(), "devices": devices, "counters": counters}
    if not guest.ended.is_set:
        out |= await balloon.facts(tools, guest)
    if guest.config is not None:
        out["config"] = config.to_tree(guest.config)
    return out


@verb
async def wait(tools: Toolstack, name: str) -> dict[str, Any]:
    """Until it ended and nothing of it is left: exit code (-1: it did not say one) and reason."""
    guest = tools.find(name, alive=False)
    await guest.buried.wait()
    assert guest.info is not None
    return {"exit_code": guest.info.exit_code, "reason": guest.info.reason}


@verb
async def destroy(tools: Toolstack, name: str) -> None:
    await tools.destroy(tools.find(name))


@verb
async def shutdown(tools: Toolstack, name: str, seconds: float = 10.0) -> None:
    await tools.shutdown(tools.find(name), seconds)


@verb
async def pause(tools: Toolstack, name: str) -> None:
    tools.pause(tools.find(name))


@verb
async def unpause(tools: Toolstack, name: str) -> None:
    tools.unpause(tools.find(name))


@verb
async def memory(tools: Toolstack, name: str) -> dict[str, Any]:
    """What it owns, should own and may own."""
    return await balloon.facts(tools, tools.find(name))


@verb
async def mem_set(tools: Toolstack, name: str, kib: int) -> dict[str, Any]:
    """Set its target, and do not wait."""
    guest = balloon.resizable(tools, name)
    await balloon.set_target(tools, guest, kib)
    return await balloon.facts(tools, guest)


@verb
async def mem_max(tools: Toolstack, name: str, kib: int) -> dict[str, Any]:
    """Set its maximum."""
    guest = balloon.resizable(tools, name)
    await balloon.set_maximum(tools, guest, kib)
    return await balloon.facts(tools, guest)


@verb
async def sched(tools: Toolstack, name: str = "", changes: dict[str, int] | None = None) -> list[dict[str, Any]]:
    """The scheduler's parameters of all domains; or of one, changed first if so asked."""
    if changes:
        guest = tools.find(name)
        try:
            cpus.set_params(tools.kernel, guest.domid, changes)
        except XenError:
            raise ToolstackError(f"{guest.name}: {PARAMS}") from None
    return _of_each(tools, name, lambda domid: cpus.params(tools.kernel, domid)._asdict())


@verb
async def vcpu_list(tools: Toolstack, name: str = "") -> list[dict[str, Any]]:
    """Where each domain's virtual CPU is, and where its time went."""
    return _of_each(tools, name, lambda domid: cpus.vcpu(tools.kernel, domid))


def _of_each(tools: Toolstack, name: str, facts: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of the one that is named, or of every one that lives."""
    rows = []
    for guest in [tools.find(name)] if name else [one for one in tools.guests.values() if not one.ended.is_set]:
        try:
            rows.append({"name": guest.name, "domid": guest.domid, **facts(guest.domid)})
        except XenError:  # it ends
            continue
    return rows


@verb
async def dmesg(tools: Toolstack) -> str:
    return tools.ask_text(ReadConsole)


@verb
async def host(tools: Toolstack) -> dict[str, Any]:
    """What this host enforces, its frames."""
    facts: dict[str, Any] = tools.ask(PhysInfo)
    kib = facts["page_bytes"] >> 10
    return {**facts, "memory_kib": facts["frames_total"] * kib, "memory_free_kib": facts["frames_free"] * kib}


@verb
async def set_time(tools: Toolstack, seconds: int, ns: int = 0) -> None:
    """The wall clock of every domain is Unix time `seconds` and `ns` now, until the host's is set."""
    try:
        clock.set_wall(tools.kernel, seconds * clock.SECOND + ns)
    except (XenError, OverflowError) as error:
        raise ToolstackError(f"no such time: {error}") from None


@verb
async def ledger(tools: Toolstack) -> dict[str, Any]:
    """Everything the system holds."""
    book: dict[str, Any] = tools.ask(Ledger)
    control = str(tools.state / "control")
    return {**book, "control_socket": control, "store_nodes": len(tools.tree.nodes), "devices": len(tools.devices.attached)}


@verb
async def stats(tools: Toolstack) -> dict[str, Any]:
    """What `top` shows, but for what the host's own /proc says."""
    facts = tools.ask(PhysInfo)
    paging = {row["domain"]: row for row in tools.ask(Ledger)["paging"]}
    domains = []
    for one in tools.infos():
        devices = [r for r in tools.drivers.statistics() if r["domid"] == one.domid]
        domain = {**one._asdict(), "pss_kib": _pss(tools, one.domid), "devices": devices, "paging": paging.get(one.name)}
        domains.append(domain)
    processes = {"hypervisor": facts["pid"], "zygote": facts["zygote_pid"]}
    return {"domains": domains, "host": facts, "processes": processes, "hypervisor_pss_kib": _pss(tools, DOMID_SELF)}


def _pss(tools: Toolstack, domid: int) -> int | None:
    try:
        return tools.kernel.call(ProcessMemory(domid))
    except XenError:
        return None


@verb
async def firewall_set(tools: Toolstack, text: str) -> None:
    """New rules, all of them. Raises where a line is wrong, with the old ones kept."""
    try:
        firewall.parse(text)
        error = await timeout(FIREWALL_SECONDS, tools.drivers.set_firewall(text))
    except firewall.RuleError as wrong:
        error = str(wrong)
    except TimeoutExpired:
        error = "the network driver domain does not answer"
    if error:
        raise ToolstackError(f"firewall: {error}")


@verb
async def firewall_list(tools: Toolstack) -> dict[str, Any]:
    """The rules in force and how many packets met each."""
    try:
        hits = await timeout(FIREWALL_SECONDS, tools.drivers.firewall_hits())
    except TimeoutExpired:
        raise ToolstackError("firewall: the network driver domain does not answer") from None
    rules = [rule.text for rule in firewall.parse(tools.drivers.firewall).rules]
    return {**hits, "text": tools.drivers.firewall, "rules": list(zip(rules, hits["rules"], strict=False))}


@verb
async def store_read(tools: Toolstack, path: str) -> str:
    """A node's value, "" where there is none."""
    try:
        return await tools.kernel.store.get(path)
    except StoreError as error:
        raise ToolstackError(f"store: {error}") from None


@verb
async def store_write(tools: Toolstack, path: str, value: str) -> None:
    """Make or change a node, as dom0."""
    try:
        await tools.kernel.store.write(path, value)
    except StoreError as error:
        raise ToolstackError(f"store: {error}") from None


@verb
async def digest(tools: Toolstack, path: str, size: int) -> str:
    """SHA-256 of the first `size` bytes of a file that dom0 can open."""
    sha = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while size > 0 and (part := file.read(min(size, DIGEST_BYTES))):
                sha.update(part)
                size -= len(part)
                await tools.kernel.sleep(0)  # everybody else's turn
    except OSError as error:
        raise ToolstackError(f"{path}: {error.strerror}") from None
    return sha.hexdigest()


@verb
async def down(tools: Toolstack) -> None:
    """End every domain and the host. The answer may not arrive: the end is the answer."""
    tools.drivers.stopping = True
    for guest in list(tools.guests.values()):
        await tools.destroy(guest)
    tools.kernel.shutdown(ShutdownReason.POWEROFF, 0, "down")
