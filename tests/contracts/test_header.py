"""hypervisor.public, ring1.h and ABI.md say the same: every number, every record, every call, in all three; and a drift of
any one of them, seeded in a copy, is found."""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dom0 import store, storeserver
from domain import xenbus
from hypervisor import console, domain, sched
from hypervisor._hv import lib
from hypervisor.gate import boot, monitor, policy
from hypervisor.public import clock, domctl, errors, evtchn, grant, hypercall, layout, memory, scheduler
from hypervisor.public.domctl import CreateFlags
from hypervisor.public.start_info import EXTENSION, StartInfo
from hypervisor.public.types import PAGE_SIZE
from ringlib._ring import ffi
from ringlib.ring import FrontRing
from tests.contracts.contract import (
    CALLS,
    ENUMS,
    HEADERS,
    PLACES,
    RECORDS,
    ROOT,
    SIZES,
    Abi,
    Header,
    differences,
    gcc,
    python_constants,
    python_enums,
    python_fields,
    python_record,
)

PUBLIC = ROOT / "hypervisor" / "public"
ABI = (ROOT / "ABI.md").read_text()
FREESTANDING = ["-ffreestanding", "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"]
RING = ("req_prod", "req_event", "rsp_prod", "rsp_event")
COMPOSED = {"ring1_start_page"}  # two records of ABI.md on one page
RESULTS: dict[str, tuple[str, ...]] = {
    "MachphysMappingCall": memory.MachphysMapping._fields,
    "GetRunState": clock.RunStateInfo._fields,
    "GetDomainInfo": domctl.DomainInfo._fields,
    "GetVcpuInfo": domctl.VcpuInfo._fields,
    "SchedulerOp": scheduler.SchedulerParams._fields,
    "EvtchnStatus": evtchn.EvtchnStatusReply._fields,
    "GrantQuerySize": grant.QuerySizeReply._fields,
}


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Header:
    return Header(PUBLIC, tmp_path_factory.mktemp("header"))


# ---- what differs, as sentences: the tests ask for none, the seeded drifts for one


def drift_of_header(header: Header) -> list[str]:
    """Between Python and C."""
    out = differences("constant", python_constants(), header.constants)
    for (module, name), (tag, field) in PLACES.items():
        at = [at for at, _, f in header.records[tag] if f == field]
        if at != [getattr(module, name)]:
            out.append(f"constant {name}: {getattr(module, name)} and {at}")
    for (module, name), (tag, field) in SIZES.items():
        size = [kind.removeprefix("char") for _, kind, f in header.records[tag] if f == field] if field else header.sizes[tag]
        if size not in ([f"[{getattr(module, name)}]"], getattr(module, name)):
            out.append(f"constant {name}: {getattr(module, name)} and {size}")
    for tag, form in RECORDS.items():
        python, c = set(python_record(form)), list(header.flat(tag))
        if not {(at, kind) for at, kind, padding in c if not padding} <= python <= {(at, kind) for at, kind, _ in c}:
            out.append(f"record {tag}: {sorted(python)} and {c}")
    return out


def drift_of_words(header: Header, abi: Abi) -> list[str]:
    """Between C and ABI.md, and of what only ABI.md and the Python say."""
    out = differences("constant", header.constants, abi.constants)
    out += differences("size of", {tag: n for tag, n in header.sizes.items() if tag not in COMPOSED}, abi.sizes)
    records = {
        tag: [field for field in fields if not field[2].startswith("pad")]
        for tag, fields in header.records.items()
        if tag not in COMPOSED
    }
    out += differences("record", records, abi.records)
    calls = {
        CALLS[kind.__name__]: (
            str(kind.OP), str(kind.CMD) if kind.OP in hypercall.WITH_CMD else "", python_fields(kind),
            "dom0" if kind.PRIVILEGED else "any",
        )
        for kind in hypercall.ALL.values()
    }  # fmt: skip
    said = {name: (row["op"], row["cmd"], row["fields"], row["who"]) for name, row in abi.calls.items()}
    out += differences("call", calls, said)
    out += differences("verdict", verdicts(), abi.verdicts)
    out += differences("limit", limits(), abi.limits)
    tables = [{(int(m), int(t)): (step, int(then)) for (m, t), (step, then) in table.items()} for table in FACING]
    return out + ([] if abi.states == tables else [f"states: {tables} and {abi.states}"])


FACING = (xenbus.FRONTEND, xenbus.BACKEND)


def verdicts() -> dict[str, set[str]]:
    """The two policies of gate/policy.py, by what a call's row ends in."""
    plain = set(policy.ALLOWED)
    conditional = {"futex", "rt_sigaction", "fcntl", "kill", "tgkill", "sendto", "recvfrom"}
    return {
        "allowed": plain,
        "allowed with conditions": conditional,
        "allowed to driver domains": {*policy.DRIVER, "recvmsg"},
        "ENOSYS": set(policy.FALL_BACK),
        "kill": set(policy.KILLED),
    }


def limits() -> dict[str, int]:
    """Limits of the implementation that stand outside of hypervisor.public."""
    return {
        "bytes of CONSOLEIO_write that the log takes of a domain in one second": console.GUEST_BYTES,
        "bytes that the log keeps": console.LOG_BYTES,
        "bytes of private memory of a domain's process (RLIMIT_DATA), its brk heap among them": boot.HEAP_BYTES,
        "ports of one SCHEDOP_poll": sched.MAX_POLL,
        "signals a second that one end of a channel may cost the other": domain.PACE,
        "signals at once that one end of a channel may cost the other": lib.EVT_BURST,
        "seconds until a domain is ended whose monitor does not answer": int(monitor.ACK_SECONDS),
        "store: nodes owned by a domain": store.MAX_NODES,
        "store: watches of a domain": store.MAX_WATCHES,
        "store: transactions of a domain at a time": store.MAX_TRANSACTIONS,
        "store: bytes of a value": store.MAX_VALUE,
        "store: paths that one transaction asked for": store.MAX_SEEN,
        "store: watch events that a domain has not read, before its connection is closed": storeserver.MAX_EVENTS,
    }


# ---- they agree


@pytest.mark.parametrize("name", HEADERS)
def test_a_freestanding_program_can_include_it(name: str, tmp_path: Path) -> None:
    """With the compiler's own headers and nothing of a C library."""
    own = subprocess.run(["gcc", "-print-file-name=include"], check=True, capture_output=True, text=True).stdout.strip()
    source = tmp_path / "only.c"
    source.write_text(f'#include "{name}"\n')
    gcc(*FREESTANDING, "-nostdinc", "-isystem", own, f"-I{PUBLIC}", "-c", str(source), "-o", str(tmp_path / "only.o"))


def test_the_header_is_the_contract(header: Header) -> None:
    assert not drift_of_header(header)


def test_the_words_are_the_contract(header: Header) -> None:
    assert not drift_of_words(header, Abi(ABI))


def test_nothing_of_the_contract_is_left_out() -> None:
    assert {kind.__name__ for kind in hypercall.ALL.values()} == set(CALLS)
    assert {f"{kind.__module__}.{kind.__name__}" for kind in python_enums()} == {
        f"{kind.__module__}.{kind.__name__}" for kind in ENUMS
    }


def test_every_record_and_its_fields_are_asserted_in_the_header(header: Header) -> None:
    text = "".join((PUBLIC / name).read_text() for name in HEADERS)
    fields = {(tag, field) for tag, record in header.records.items() for _, _, field in record}
    assert set(re.findall(r"RING1_SIZE\((\w+), \d", text)) == header.sizes.keys()
    placed = set(re.findall(r"RING1_AT\((\w+), (\w+), \w+\)", text))
    assert {(tag, field) for tag, field in fields if not field.startswith("pad")} - placed == {("ring1_start_page", "xen")}


def test_what_a_refusal_may_say_is_listed() -> None:
    """Each error that the docstring of a call names stands in its row."""
    calls = Abi(ABI).calls
    refusals = {refusal.__name__: errno.errorcode[number] for number, refusal in errors.BY_ERRNO.items()}
    for kind in hypercall.ALL.values():
        said = calls[CALLS[kind.__name__]]["errors"].split()
        raised = re.search(r"Raises (.*)", " ".join((kind.__doc__ or "").split()))
        for name in re.findall(r"[A-Z]\w+", raised[1] if raised else ""):
            assert name not in refusals or refusals[name] in said, f"{kind.__name__}: {name}"


def test_results_are_named_in_order() -> None:
    calls = Abi(ABI).calls
    for name, fields in RESULTS.items():
        assert calls[CALLS[name]]["result"] == ", ".join(fields)


def test_start_info_is_found_under_its_names(header: Header) -> None:
    """What Python packs is where the C fields of those names are."""
    numbers = iter(range(1000, 2000))
    info = StartInfo(
        nr_pages=next(numbers), flags=next(numbers), store_pfn=next(numbers), store_evtchn=next(numbers),
        console_pfn=next(numbers), console_evtchn=next(numbers), mod_start=next(numbers), mod_len=next(numbers),
        cmdline="cmd", domid=next(numbers), name="name", virt_base=next(numbers), window=next(numbers),
        shared_info=next(numbers), request_mqd=next(numbers), reply_mqd=next(numbers), upcall_fd=next(numbers),
        descriptors_fd=next(numbers), boot_ns=next(numbers), grant_table=next(numbers), nr_grant_entries=next(numbers),
        entry="entry", pt_base=next(numbers), nr_pt_frames=next(numbers), mfn_list=next(numbers), max_pages=next(numbers),
    )  # fmt: skip
    page, seen = info.pack(), set()
    for base, tag in ((0, "start_info"), (EXTENSION, "ring1_start_info")):
        for at, kind, field in header.records[tag]:
            name = {"cmd_line": "cmdline"}.get(field, field)
            if not hasattr(info, name):
                continue
            seen.add(name)
            want = getattr(info, name)
            if kind.startswith("char"):
                assert page[base + at :].startswith(want.encode() + b"\0"), field
            else:
                assert int.from_bytes(page[base + at : base + at + int(kind[1:]) // 8], "little") == want, field
    assert seen == set(StartInfo.__dataclass_fields__)


def test_a_ring_is_the_ring_of_ringlib(tmp_path: Path) -> None:
    source = tmp_path / "ring.c"
    pairs = [f"offsetof(struct ring1_sring, {f}) == offsetof(struct ring_shared, {f})" for f in RING]
    pairs.append("sizeof(struct ring1_sring) == sizeof(struct ring_shared)")
    source.write_text(
        '#include "io/ring1_io.h"\n#include "ring.h"\n' + "".join(f'_Static_assert({pair}, "");\n' for pair in pairs)
    )
    gcc("-std=c11", f"-I{PUBLIC}", f"-I{ROOT / 'ringlib'}", "-c", str(source), "-o", str(tmp_path / "ring.o"))


@pytest.mark.parametrize(
    ("request_tag", "response_tag", "sentence"),
    [
        ("blkif_request", "blkif_response", "One ring of {} slots of {} bytes."),
        ("netif_tx_request", "netif_tx_response", "transmit, {} slots of {} bytes"),
        ("netif_rx_request", "netif_rx_response", "receive, {} slots of {} bytes"),
        ("multicall_entry", "ring1_callring_answer", "{} slots of {} bytes; the domain is the frontend"),
    ],
)
def test_a_ring_has_the_slots_that_are_said(header: Header, request_tag: str, response_tag: str, sentence: str) -> None:
    page = ffi.new("char[]", PAGE_SIZE)
    sizes = header.sizes[request_tag], header.sizes[response_tag]
    ring = FrontRing(int(ffi.cast("uintptr_t", page)), PAGE_SIZE, *sizes)
    assert sentence.format(ring.nr_ents, max(sizes)) in " ".join(ABI.split())


def test_the_kernels_page_begins_where_it_is_said(header: Header) -> None:
    """Numbers that prose repeats."""
    assert f"0x{layout.virt(layout.KERNEL_PFN):X} (VIRT_BASE + KERNEL_PFN * 4096)" in ABI
    assert f"nr_frames counts the twelve fixed ones and is at least {layout.KERNEL_PFN + 1}" in " ".join(ABI.split())
    assert header.constants["RING1_CREATE_UNFILTERED"] == CreateFlags.UNFILTERED


# ---- and a drift is found


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("RING1_MAX_PORTS", "#define RING1_MAX_PORTS 1024", "#define RING1_MAX_PORTS 1023"),
        ("EVTCHNOP_send", "#define EVTCHNOP_send 4", "#define EVTCHNOP_send 6"),
        ("__HYPERVISOR_sched_op", "#define __HYPERVISOR_sched_op 29", "#define __HYPERVISOR_sched_op 30"),
        ("RING1_MAGIC", '"ring1-0.1-x86_64"', '"ring1-0.2-x86_64"'),
        ("GNTST_bad_handle", "GNTST_bad_handle = -4", "GNTST_bad_handle = -6"),
        ("XEN_EAGAIN", "    XEN_EAGAIN = 11,\n", ""),
        ("RING1_NEW", "#define RING1_MAX_BATCH 512\n", "#define RING1_MAX_BATCH 512\n#define RING1_NEW 1\n"),
        ("BLKIF_RSP_ERROR", "BLKIF_RSP_ERROR = -1", "BLKIF_RSP_ERROR = 1"),
        ("blkif_response", "    int16_t status;\n    uint32_t pad1;", "    uint16_t status;\n    uint32_t pad1;"),
        ("SHARED_PENDING_SEL", "uint64_t evtchn_pending_sel; ", "uint64_t other_name; "),
        ("IN_BYTES", "char in[1024], out[2048];", "char in[512], in2[512], out[2048];"),
    ],
)
def test_a_drifting_header_is_found(tmp_path: Path, name: str, old: str, new: str) -> None:
    copy = tmp_path / "public"
    (copy / "io").mkdir(parents=True)
    changed = 0
    for path in HEADERS:
        text = (PUBLIC / path).read_text()
        changed += text.count(old)
        text = re.sub(r"^RING1_AT.*evtchn_pending_sel.*\n", "", text.replace(old, new), flags=re.M)
        (copy / path).write_text(text)
    assert changed == 1
    drift = drift_of_header(Header(copy, tmp_path))
    assert any(name in sentence for sentence in drift), drift


@pytest.mark.parametrize("old", ["RING1_AT(start_info, flags, 48)", "RING1_SIZE(blkif_request, 112)"])
def test_a_wrong_layout_does_not_compile(tmp_path: Path, old: str) -> None:
    shutil.copytree(PUBLIC, tmp_path / "public", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for path in HEADERS:
        file = tmp_path / "public" / path
        file.write_text(re.sub(re.escape(old), old[:-1] + " + 4)", file.read_text()))
    with pytest.raises(subprocess.CalledProcessError) as error:
        Header(tmp_path / "public", tmp_path)
    assert "static assertion failed" in error.value.stderr


def test_every_drifting_word_is_found(header: Header) -> None:
    """Each row of each table of ABI.md in turn, with one more than its first number; then without the row."""
    lines, before = ABI.splitlines(), set(drift_of_words(header, Abi(ABI)))
    rows = list(_rows(lines))
    assert len(rows) > 300
    for i in rows:
        for changed in (_one_more(lines[i]), ""):
            words = lines[:i] + [changed] * bool(changed) + lines[i + 1 :]
            assert set(drift_of_words(header, Abi("\n".join(words)))) - before, f"not found: {lines[i]} -> {changed}"


def _rows(lines: list[str]) -> Iterator[int]:
    """Lines that are rows of the tables that are compared."""
    head = ""
    for i, line in enumerate(lines):
        if not line.startswith("|"):
            head = ""
        elif not head:
            head = line.split("|")[1].strip()
        elif head in ("name", "offset", "op", "mine", "limit") and "---" not in line:
            yield i


def _one_more(row: str) -> str:
    """The row with the number in its first cell of numbers raised by one; of a text, the text changed."""
    match = re.search(r"\| (-?(?:0x[0-9A-F_]+|\d+)) \|", row)
    if match is None:
        return row.replace('"ring1', '"ring2')
    return row[: match.start(1)] + str(int(match[1].replace("_", ""), 0) + 1) + row[match.end(1) :]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| u16 domid, u32 port | state", "| u32 domid, u32 port | state"),
        ("u16 domid, u64 root, u64 entry | | dom0", "u16 domid, u64 root, u64 entry | | any"),
        ("| kill | ptrace", "| kill | openat"),
        ("preadv2 pwritev2", "preadv2 pwritev2 mmap"),
        ("| 4 | 5 | stop | 5 |", "| 4 | 5 | stop | 6 |"),
        ("| u16 | domid | [DOM] who may use", "| s16 | domid | [DOM] who may use"),
        ("### struct start_info, 1168 bytes", "### struct start_info, 1160 bytes"),
    ],
)
def test_a_drifting_sentence_is_found(header: Header, old: str, new: str) -> None:
    assert ABI.count(old) == 1
    assert set(drift_of_words(header, Abi(ABI.replace(old, new)))) - set(drift_of_words(header, Abi(ABI)))
