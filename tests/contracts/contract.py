"""The contract three times over, each as plain values that can be compared: hypervisor.public, the C headers, ABI.md.

    python_*()     names, numbers and records that the Python modules declare, under their names in C
    Header(dir)    what the headers in `dir` declare, with the values a compiled program prints
    Abi(text)      what the tables of ABI.md say

A record is a list of (offset, type, field) with types u8..u64, s8..s64, char and NAME for a struct, each with [n] for an array.
"""

from __future__ import annotations

import ast
import errno
import inspect
import re
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum, IntFlag
from pathlib import Path
from types import ModuleType
from typing import Any

from hypervisor import dispatch
from hypervisor.gate import boot
from hypervisor.public import (
    callring,
    clock,
    console,
    domctl,
    errors,
    evtchn,
    grant,
    hypercall,
    layout,
    memory,
    mmu,
    sched,
    scheduler,
    segments,
    start_info,
    sysctl,
    traps,
    types,
    user,
    version,
)
from hypervisor.public.hypercall import Hypercall
from hypervisor.public.io import blkif, netif, stats, xenbus, xs_wire
from hypervisor.public.io import console as io_console
from hypervisor.public.types import Bits, Text
from tests.conftest import TIMEOUT

ROOT = Path(__file__).resolve().parent.parent.parent
HEADERS = ("ring1.h", "ring1_mmu.h", "ring1_user.h", "ring1_message.h", "io/ring1_io.h")
Field = tuple[int, str, str]
Value = int | str

# ---- Python

PREFIX: dict[ModuleType, str] = {
    types: "RING1_", layout: "RING1_", start_info: "RING1_", version: "RING1_", grant: "RING1_", domctl: "RING1_",
    user: "RING1_",
    mmu: "RING1_", traps: "RING1_", clock: "RING1_", memory: "RING1_", callring: "RING1_CALLRING_", blkif: "BLKIF_",
    netif: "NETIF_", stats: "RING1_STATS_", xs_wire: "XENSTORE_",
    scheduler: "RING1_", segments: "RING1_", console: "", evtchn: "", sched: "", sysctl: "", errors: "", xenbus: "",
    io_console: "",
}  # fmt: skip
XEN_SAYS_SO = ("DOMID_", "VIRQ_", "SIF_")
ENUMS: dict[type[IntEnum] | type[IntFlag], Callable[[str], str]] = {
    evtchn.State: lambda name: f"EVTCHNSTAT_{name.lower()}",
    sched.ShutdownReason: lambda name: f"SHUTDOWN_{name.lower()}",
    scheduler.SchedulerCommand: lambda name: f"XEN_DOMCTL_SCHEDOP_{name.lower()}",
    clock.RunState: lambda name: f"RUNSTATE_{name.lower()}",
    mmu.Pte: lambda name: f"RING1_PTE_{name}",
    mmu.PageType: lambda name: f"RING1_PAGE_{name}",
    mmu.UpdateCommand: lambda name: {
        "NORMAL": "MMU_NORMAL_PT_UPDATE", "MACHPHYS": "MMU_MACHPHYS_UPDATE", "PRESERVE_AD": "MMU_PT_UPDATE_PRESERVE_AD",
    }[name],
    traps.Vector: lambda name: f"RING1_VECTOR_{name}",
    traps.VmassCommand: lambda name: f"VMASST_CMD_{name.lower()}",
    traps.VmassType: lambda name: f"VMASST_TYPE_{name.lower()}",
    mmu.MmuextCommand: lambda name: "MMUEXT_" + {
        "PIN_L1": "PIN_L1_TABLE", "PIN_L2": "PIN_L2_TABLE", "PIN_L3": "PIN_L3_TABLE", "UNPIN": "UNPIN_TABLE",
        "TLB_FLUSH": "TLB_FLUSH_LOCAL", "INVLPG": "INVLPG_LOCAL",
    }.get(name, name),
    domctl.CreateFlags: lambda name: f"RING1_CREATE_{name}",
    grant.Gtf: lambda name: f"GTF_{name.lower()}",
    grant.MapFlags: lambda name: f"GNTMAP_{name.lower()}",
    grant.GrantStatus: lambda name: f"GNTST_{name.lower()}",
    blkif.BlkOp: lambda name: f"BLKIF_OP_{name}",
    blkif.BlkStatus: lambda name: f"BLKIF_RSP_{name}",
    netif.NetStatus: lambda name: f"NETIF_RSP_{name}",
    stats.StatsKind: lambda name: f"RING1_STATS_{name}",
    xs_wire.XsType: lambda name: f"XS_{name}",
    xenbus.XenbusState: lambda name: "XenbusState" + "".join(word.capitalize() for word in name.split("_")),
}
OPS = {
    "OP_SET_TRAP_TABLE": "__HYPERVISOR_set_trap_table", "OP_MMU_UPDATE": "__HYPERVISOR_mmu_update",
    "OP_UPDATE_VA_MAPPING": "__HYPERVISOR_update_va_mapping", "OP_MMUEXT": "__HYPERVISOR_mmuext_op",
    "OP_STACK_SWITCH": "__HYPERVISOR_stack_switch", "OP_SET_CALLBACKS": "__HYPERVISOR_set_callbacks",
    "OP_SET_GDT": "__HYPERVISOR_set_gdt", "OP_UPDATE_DESCRIPTOR": "__HYPERVISOR_update_descriptor",
    "OP_PLATFORM": "__HYPERVISOR_platform_op", "OP_VCPU": "__HYPERVISOR_vcpu_op",
    "OP_MEMORY": "__HYPERVISOR_memory_op", "OP_MULTICALL": "__HYPERVISOR_multicall",
    "OP_SET_TIMER": "__HYPERVISOR_set_timer_op", "OP_XEN_VERSION": "__HYPERVISOR_xen_version",
    "OP_CONSOLE_IO": "__HYPERVISOR_console_io", "OP_GRANT_TABLE": "__HYPERVISOR_grant_table_op",
    "OP_VM_ASSIST": "__HYPERVISOR_vm_assist",
    "OP_SCHED": "__HYPERVISOR_sched_op", "OP_EVENT_CHANNEL": "__HYPERVISOR_event_channel_op",
    "OP_SYSCTL": "__HYPERVISOR_sysctl", "OP_DOMCTL": "__HYPERVISOR_domctl", "OP_CALLRING": "RING1_OP_callring",
    "OP_USER": "RING1_OP_user",
}  # fmt: skip
CALLS = {
    "StackSwitch": "__HYPERVISOR_stack_switch", "SetCallbacks": "__HYPERVISOR_set_callbacks",
    "SetTrapTable": "__HYPERVISOR_set_trap_table", "VmAssist": "__HYPERVISOR_vm_assist", "MmuUpdate": "__HYPERVISOR_mmu_update",
    "UpdateVaMapping": "__HYPERVISOR_update_va_mapping", "MmuextOp": "__HYPERVISOR_mmuext_op",
    "IncreaseReservation": "XENMEM_increase_reservation", "Exchange": "XENMEM_exchange",
    "MachphysMappingCall": "XENMEM_machphys_mapping", "SetTime": "XENPF_settime64",
    "GetRunState": "VCPUOP_get_runstate_info", "SetPeriodicTimer": "VCPUOP_set_periodic_timer",
    "StopPeriodicTimer": "VCPUOP_stop_periodic_timer", "SetVirtualTimer": "RING1_VCPUOP_set_virtual_timer",
    "GetMemList": "XEN_DOMCTL_getmemlist", "SetMaxMem": "XEN_DOMCTL_max_mem",
    "GetVcpuInfo": "XEN_DOMCTL_getvcpuinfo", "SchedulerOp": "XEN_DOMCTL_scheduler_op",
    "DecreaseReservation": "XENMEM_decrease_reservation", "PopulatePhysmap": "XENMEM_populate_physmap",
    "CurrentReservation": "XENMEM_current_reservation", "MaximumReservation": "XENMEM_maximum_reservation",
    "SetGdt": "__HYPERVISOR_set_gdt", "UpdateDescriptor": "__HYPERVISOR_update_descriptor",
    "Multicall": "__HYPERVISOR_multicall", "SetTimer": "__HYPERVISOR_set_timer_op",
    "XenVersion": "XENVER_version", "XenExtraVersion": "XENVER_extraversion", "XenPageSize": "XENVER_pagesize",
    "ConsoleWrite": "CONSOLEIO_write",
    "GrantMap": "GNTTABOP_map_grant_ref", "GrantUnmap": "GNTTABOP_unmap_grant_ref", "GrantQuerySize": "GNTTABOP_query_size",
    "GrantSetupTable": "GNTTABOP_setup_table", "GrantTransfer": "GNTTABOP_transfer", "GrantCopy": "GNTTABOP_copy",
    "SchedYield": "SCHEDOP_yield", "SchedBlock": "SCHEDOP_block", "SchedShutdown": "SCHEDOP_shutdown",
    "SchedPoll": "SCHEDOP_poll",
    "BindInterdomain": "EVTCHNOP_bind_interdomain", "BindVirq": "EVTCHNOP_bind_virq", "EvtchnClose": "EVTCHNOP_close",
    "EvtchnSend": "EVTCHNOP_send", "EvtchnStatus": "EVTCHNOP_status", "AllocUnbound": "EVTCHNOP_alloc_unbound",
    "BindIpi": "EVTCHNOP_bind_ipi", "EvtchnUnmask": "EVTCHNOP_unmask", "EvtchnReset": "EVTCHNOP_reset",
    "ReadConsole": "XEN_SYSCTL_readconsole", "PhysInfo": "XEN_SYSCTL_physinfo",
    "GetDomainInfoList": "XEN_SYSCTL_getdomaininfolist", "Ledger": "RING1_SYSCTL_ledger",
    "ProcessMemory": "RING1_SYSCTL_process_memory",
    "CreateDomain": "XEN_DOMCTL_createdomain", "DestroyDomain": "XEN_DOMCTL_destroydomain",
    "PauseDomain": "XEN_DOMCTL_pausedomain", "UnpauseDomain": "XEN_DOMCTL_unpausedomain",
    "GetDomainInfo": "XEN_DOMCTL_getdomaininfo", "MapForeign": "RING1_DOMCTL_map_foreign",
    "UnmapForeign": "RING1_DOMCTL_unmap_foreign", "LaunchInfo": "RING1_DOMCTL_launch_info",
    "CallringSetup": "RING1_CALLRING_setup", "CallringKick": "RING1_CALLRING_kick",
    "UserInterrupt": "RING1_USER_interrupt", "UserDestroy": "RING1_USER_destroy",
}  # fmt: skip
RECORDS = {  # format characters of struct, in the order of the record's fields
    "multicall_entry": dispatch.ENTRY.format,
    "ring1_callring_answer": callring.ANSWER.format,
    "ring1_cell": user.CELL.format,
    "mmu_update": mmu.UPDATE.format,
    "mmuext_op": mmu.EXT_OP.format,
    "trap_info": traps.TRAP_INFO.format,
    "ring1_traps": traps.TRAPS.format,
    "start_info": start_info._XEN.format,
    "ring1_start_info": start_info._OWN.format,
    "grant_entry_v1": grant.ENTRY.format,
    "gnttab_map_grant_ref": grant.MAP_REF.format,
    "gnttab_unmap_grant_ref": grant.UNMAP_REF.format,
    "gnttab_transfer": grant.TRANSFER.format,
    "gnttab_copy": grant.COPY.format,
    "blkif_segment": blkif.SEGMENT.format,
    "blkif_request": blkif.HEAD.format + blkif.SEGMENT.format.removeprefix("<") * blkif.MAX_SEGMENTS,
    "blkif_response": blkif.RESPONSE.format,
    "netif_tx_request": netif.TX_REQUEST.format,
    "netif_tx_response": netif.TX_RESPONSE.format,
    "netif_rx_request": netif.RX_REQUEST.format,
    "netif_rx_response": netif.RX_RESPONSE.format,
    "xsd_sockmsg": xs_wire.HEADER.format,
    "ring1_stats_row": stats.ROW.format,
}
PLACES = {  # constants that C says as the offset of a field
    (start_info, "SHARED_UPCALL_PENDING"): ("vcpu_info", "evtchn_upcall_pending"),
    (start_info, "SHARED_UPCALL_MASK"): ("vcpu_info", "evtchn_upcall_mask"),
    (start_info, "SHARED_PENDING_SEL"): ("vcpu_info", "evtchn_pending_sel"),
    (start_info, "SHARED_CR2"): ("vcpu_info", "cr2"),
    (start_info, "SHARED_TIME"): ("vcpu_info", "time"),
    (start_info, "SHARED_WINDOW"): ("shared_info", "window"),
    (start_info, "SHARED_PENDING"): ("shared_info", "evtchn_pending"),
    (start_info, "SHARED_MASK"): ("shared_info", "evtchn_mask"),
    (start_info, "SHARED_WALLCLOCK"): ("shared_info", "wc_version"),
    **{(io_console, name): ("xencons_interface", name.lower()) for name in "IN OUT IN_CONS IN_PROD OUT_CONS OUT_PROD".split()},
    **{
        (xs_wire, name): ("xenstore_domain_interface", name.lower())
        for name in "REQ RSP REQ_CONS REQ_PROD RSP_CONS RSP_PROD".split()
    },
}
SIZES = {  # and those that it says as a size
    (io_console, "IN_BYTES"): ("xencons_interface", "in"),
    (io_console, "OUT_BYTES"): ("xencons_interface", "out"),
    (blkif, "REQUEST_BYTES"): ("blkif_request", ""),
    (blkif, "RESPONSE_BYTES"): ("blkif_response", ""),
    (callring, "ENTRY_BYTES"): ("multicall_entry", ""),
    (callring, "ANSWER_BYTES"): ("ring1_callring_answer", ""),
}
CODES = {"B": "u8", "H": "u16", "h": "s16", "I": "u32", "i": "s32", "Q": "u64", "q": "s64"}


def assigned(module: ModuleType) -> Iterator[tuple[str, Value]]:
    """Constants that a module itself assigns: numbers and byte strings with names in capitals."""
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.Assign):
            for target in ast.walk(node.targets[0]):
                if isinstance(target, ast.Name) and target.id.isupper() and not target.id.startswith("_"):
                    value = getattr(module, target.id)
                    if isinstance(value, bytes):
                        yield target.id, value.decode()
                    elif isinstance(value, int):
                        yield target.id, value


def python_constants() -> dict[str, Value]:
    """Every constant of the contract by its name in C."""
    out: dict[str, Value] = {}
    for module, prefix in PREFIX.items():
        for name, value in assigned(module):
            if (module, name) not in PLACES and (module, name) not in SIZES:
                assert prefix or name.startswith(XEN_SAYS_SO), f"{module.__name__}.{name} has no name in C"
                out[name if name.startswith(XEN_SAYS_SO) else prefix + name] = value
    for enum, rule in ENUMS.items():
        out |= {rule(name): int(member) for name, member in enum.__members__.items()}
    out = {name: value - (1 << 64) if isinstance(value, int) and value >> 63 == 1 else value for name, value in out.items()}
    out |= {f"XEN_{errno.errorcode[number]}": number for number in errors.BY_ERRNO}
    out["RING1_UPCALL_SIGNAL"] = int(boot.UPCALL_SIGNAL)
    out |= {"GNTCOPY_source_gref": 1, "GNTCOPY_dest_gref": 2}  # said in words by public/grant.py
    out |= {OPS[name]: number for name, number in vars(hypercall).items() if name.startswith("OP_")}
    out |= {CALLS[kind.__name__]: kind.CMD for kind in hypercall.ALL.values() if kind.OP in hypercall.WITH_CMD}
    return out


def python_enums() -> list[type[Any]]:
    """Every enumeration the contract declares."""
    found = (value for module in PREFIX for value in vars(module).values() if isinstance(value, type))
    return [kind for kind in found if issubclass(kind, IntEnum | IntFlag) and kind.__module__.startswith("hypervisor.")]


def python_record(form: str) -> list[tuple[int, str]]:
    """(offset, type) of what a struct format packs, one by one; a string is char[n]."""
    out, at = [], 0
    for count, code in re.findall(r"(\d*)([a-zA-Z])", form):
        if code == "s":
            out.append((at, f"char[{count}]"))
            at += int(count)
            continue
        for _ in range(int(count or 1)):
            if code != "x":
                out.append((at, CODES[code]))
            at += struct.calcsize("<" + code)
    return out


def python_fields(kind: type[Hypercall[Any]]) -> str:
    """The fields of a call as ABI.md writes them."""
    words = []
    for name, field in zip(kind.__struct_fields__, kind.FIELDS, strict=True):
        if isinstance(field, Bits):
            words.append(f"u{field.bits} {name}")
        else:
            words.append(f"{'text' if isinstance(field, Text) else 'bytes'}[{field.size}] {name}")
    return ", ".join(words)


# ---- C


class Header:
    """The headers under `directory`: `constants` by name, `records` by tag, `sizes` by tag. Raises CalledProcessError."""

    def __init__(self, directory: Path, scratch: Path) -> None:
        text = "\n".join(re.sub(r"/\*.*?\*/", "", (directory / name).read_text(), flags=re.S) for name in HEADERS)
        names = re.findall(r"^#define (\w+) \S", text, re.M)
        for body in re.findall(r"\benum \{(.*?)\}", text, re.S):
            names += re.findall(r"(\w+) =", body)
        records = re.findall(r"^struct (\w+) \{(.*?)^\}", text, re.S | re.M)
        self._declared = {tag: list(_declarations(body)) for tag, body in records}
        self.constants: dict[str, Value] = {}
        self.sizes: dict[str, int] = {}
        self.records: dict[str, list[Field]] = {tag: [] for tag in self._declared}
        for line in _run(directory, self._program(names), scratch).splitlines():
            self._read(line.split(" ", 5))

    def _program(self, names: list[str]) -> str:
        lines = [f'print_{"text" if name == "RING1_MAGIC" else "number"}("{name}", {name});' for name in names]
        for tag, fields in self._declared.items():
            lines.append(f'printf("size {tag} %zu\\n", sizeof(struct {tag}));')
            for kind, field in fields:
                at, size = f"offsetof(struct {tag}, {field})", f"sizeof(((struct {tag} *)0)->{field})"
                lines.append(f'printf("field {tag} {field} {kind} %zu %zu\\n", {at}, {size} / sizeof({c_type(kind)}));')
        body = "\n    ".join(lines)
        return (
            '#include "io/ring1_io.h"\n#include "ring1_mmu.h"\n#include "ring1_user.h"\n#include <stdio.h>\n'
            'static void print_number(const char *n, long long v) { printf("number %s %lld\\n", n, v); }\n'
            'static void print_text(const char *n, const char *v) { printf("text %s %s\\n", n, v); }\n'
            f"int main(void)\n{{\n    {body}\n    return 0;\n}}\n"
        )

    def _read(self, words: list[str]) -> None:
        match words:
            case ["number", name, value]:
                self.constants[name] = int(value)
            case ["text", name, value]:
                self.constants[name] = value
            case ["size", tag, size]:
                self.sizes[tag] = int(size)
            case ["field", tag, field, kind, at, count]:
                array = f"[{count}]" if int(count) > 1 else ""
                self.records[tag].append((int(at), kind.removeprefix("struct:") + array, field))

    def flat(self, tag: str, base: int = 0) -> Iterator[tuple[int, str, bool]]:
        """(offset, type, is padding) of a record with arrays and records within it taken apart; char[n] stays whole."""
        for at, kind, field in self.records[tag]:
            element, _, rest = kind.partition("[")
            count = int(rest.rstrip("]") or 1)
            if element == "char":
                yield base + at, kind, False
                continue
            size = self.sizes[element] if element in self.sizes else int(element[1:]) // 8
            for i in range(count):
                if element in self.sizes:
                    yield from self.flat(element, base + at + i * size)
                else:
                    yield base + at + i * size, element, field.startswith("pad")


def c_type(kind: str) -> str:
    """u16 -> uint16_t."""
    if kind.startswith("struct:"):
        return kind.replace(":", " ")
    return kind if kind == "char" else f"{'u' if kind[0] == 'u' else ''}int{kind[1:]}_t"


def _declarations(body: str) -> Iterator[tuple[str, str]]:
    """(type, field) of the members of a struct."""
    for declaration in body.split(";"):
        match = re.match(r"\s*(struct \w+|\w+)\s+(.*)", declaration, re.S)
        if match:
            kind = match[1].replace(" ", ":")
            if number := re.fullmatch(r"(u?)int(\d+)_t", kind):
                kind = f"{number[1] or 's'}{number[2]}"
            for declarator in re.sub(r"\[.*?\]", "", match[2]).split(","):
                yield kind, declarator.strip()


def _run(directory: Path, source: str, scratch: Path) -> str:
    """What a program compiled against the headers prints."""
    (scratch / "extract.c").write_text(source)
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{directory}"]
    gcc(*flags, str(scratch / "extract.c"), "-o", str(scratch / "extract"))
    return subprocess.run([scratch / "extract"], check=True, capture_output=True, text=True, timeout=TIMEOUT).stdout


def gcc(*arguments: str) -> None:
    """Raises CalledProcessError; its stderr says why."""
    subprocess.run(["gcc", *arguments], check=True, capture_output=True, text=True, timeout=TIMEOUT)


# ---- words


class Abi:
    """The tables of ABI.md, by the words in their heads."""

    def __init__(self, text: str) -> None:
        self.constants: dict[str, Value] = {}
        self.records: dict[str, list[Field]] = {}
        self.sizes: dict[str, int] = {}
        self.calls: dict[str, dict[str, str]] = {}
        self.states: list[dict[tuple[int, int], tuple[str, int]]] = []
        self.verdicts: dict[str, set[str]] = {}
        self.limits: dict[str, int] = {}
        heading = ""
        head: list[str] = []
        for line in text.splitlines():
            if line.startswith("#"):
                heading = line.lstrip("# ")
            if not line.startswith("|"):
                head = []
                continue
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not head:
                head = cells
                if head[0] == "mine":
                    self.states.append({})
            elif not set(line) <= set("|-"):
                self._row(heading, head, cells)

    def _row(self, heading: str, head: list[str], cells: list[str]) -> None:
        match head[:2]:
            case ["name", "value"]:
                self.constants[cells[0].strip("`")] = _value(cells[1])
            case ["offset", "type"]:
                match = re.fullmatch(r"struct (\w+), (\d+) bytes", heading)
                assert match, heading
                self.sizes[match[1]] = int(match[2])
                record = self.records.setdefault(match[1], [])
                record.append((int(cells[0]), cells[1].removeprefix("struct "), cells[2]))
            case ["op", "cmd"]:
                call = dict(zip(head, cells, strict=True))
                name = call["name"].strip("`")
                self.calls[name] = call
                if call["cmd"]:
                    self.constants[name] = int(call["cmd"])
            case ["mine", "theirs"]:
                mine, theirs, step, then = cells
                self.states[-1][int(mine), int(theirs)] = (step, int(then))
            case ["verdict", "calls"]:
                self.verdicts[cells[0]] = set(cells[1].split())
            case ["limit", "value"]:
                self.limits[cells[0]] = int(cells[1])


def _value(text: str) -> Value:
    return text.strip('"') if text.startswith('"') else int(text.replace("_", ""), 0)


def differences(what: str, left: Mapping[str, object], right: Mapping[str, object]) -> list[str]:
    """One sentence for each name on which two tables do not agree."""
    return [
        f"{what} {name}: {left.get(name, 'missing')} and {right.get(name, 'missing')}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]
