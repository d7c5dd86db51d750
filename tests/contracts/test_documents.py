"""The documents name only what is there: files, modules, names, calls, commands, limits; and their examples work.

A rule takes a text and returns what is wrong with it, as sentences. The tests ask for none in the documents, and for one
where something wrong was seeded.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.main import get_command

from dom0 import cli
from hypervisor import core, dispatch  # whoever imports core has imported every request
from hypervisor.public import hypercall as abi
from hypervisor.public.callring import ENTRY
from hypervisor.public.version import Multicall
from tests.models.stand_in import SCRATCH, StandIn

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = [name for name in ("README.md", "DESIGN.md", "CONTRIBUTING.md", "ABI.md", "CHANGELOG.md") if (ROOT / name).exists()]
DESIGN, CONTRIBUTING = ((ROOT / name).read_text() for name in ("DESIGN.md", "CONTRIBUTING.md"))
PACKAGES = ("ringlib", "hypervisor", "domain", "dom0")
FOLDERS = (*PACKAGES, "tests", "scripts", ".ci")
SUFFIXES = (".py", ".pyi", ".c", ".h", ".md", ".lds")
XEN_OPS = set(range(43)) - {11}  # 11 is unused; what comes after 42 is the architecture's
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")
Rule = Callable[[str], list[str]]


# ---- what is in a text


def quoted(text: str) -> list[str]:
    """What stands in backticks, outside of blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def examples(text: str) -> list[str]:
    """The blocks that are Python."""
    return [body for language, body in FENCE.findall(text) if language == "python"]


def commands(text: str) -> list[str]:
    """What may be a command line: what is quoted, and the lines of blocks."""
    blocks = [body for language, body in FENCE.findall(text) if language != "python"] + INDENTED.findall(FENCE.sub("", text))
    return [line.strip().removeprefix("$ ") for part in (*quoted(text), *blocks) for line in part.splitlines()]


# ---- what is in the tree


def trees() -> Iterator[tuple[str, ast.Module]]:
    """Every module of ours by its dotted name."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), ast.parse(path.read_text())


def defined(body: list[ast.stmt]) -> set[str]:
    """Names that a module's or a class's body defines."""
    out: set[str] = set()
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            out.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            out |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return out


def members(node: ast.ClassDef) -> set[str]:
    """As `defined`, and what its methods assign to self."""
    walked = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    return defined(node.body) | {n.attr for n in walked if ast.unparse(n.value) == "self"}


MODULES: dict[str, set[str]] = {}  # hypervisor.evtchn -> its names
STEMS: dict[str, set[str]] = {}  # evtchn -> the names of every evtchn.py
CLASSES: dict[str, set[str]] = {}
for _module, _tree in trees():
    MODULES[_module] = defined(_tree.body)
    STEMS.setdefault(_module.rpartition(".")[2], set()).update(MODULES[_module])
    for _node in ast.walk(_tree):
        if isinstance(_node, ast.ClassDef):
            CLASSES.setdefault(_node.name, set()).update(members(_node))
IN_C = set(re.findall(r"\w+", "".join(path.read_text() for path in (ROOT / "hypervisor" / "public").rglob("*.h"))))


# ---- the rules


def missing_files(text: str) -> list[str]:
    """A path in one of our folders; a name alone with one of our suffixes: at the root, or some file's in a folder."""
    wrong = []
    for item, word in [(quote, word) for quote in quoted(text) for word in quote.split()]:
        path = word.partition("::")[0].rstrip("/")
        if not re.fullmatch(r"[\w./*-]+", path):
            continue
        if "/" in path:
            there = path.split("/")[0] not in FOLDERS or any(ROOT.glob(path))
        else:  # within a command it is the reader's own file
            ours = item == word and path.endswith(SUFFIXES) and not path.startswith(".")
            there = not ours or any(ROOT.glob(path)) or any(any((ROOT / folder).rglob(path)) for folder in FOLDERS)
        if not there:
            wrong.append(f"no file {word}")
    return wrong


def missing_names(text: str) -> list[str]:
    """hypervisor.loop.Loop, grant.take_back, Monitor.batch: in a module of ours, in one of that name, in a class."""
    wrong = []
    for item in quoted(text):
        word = item.removesuffix("()")
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", word) or word.endswith((*SUFFIXES, ".log")):
            continue
        head, _, last = word.rpartition(".")
        if word.split(".")[0] in PACKAGES:
            there = word in MODULES or last in MODULES.get(head, ()) or (ROOT / word.replace(".", "/")).is_dir()
        else:
            known = STEMS.get(head, set()) | CLASSES.get(head, set())
            there = not known or last in known  # else somebody else's: os.pread, a field of a record
        if not there:
            wrong.append(f"no name {word}")
    return wrong


def missing_classes(text: str) -> list[str]:
    """CamelCase is a class of ours, as every request is, or a name of the C headers."""
    found = (re.fullmatch(r"([A-Z][a-z]+(?:[A-Z][a-z0-9]*)+)(?:\(.*\))?", item) for item in quoted(text))
    words = sorted({match[1] for match in found if match})
    return [f"no class {word}" for word in words if word not in CLASSES and word not in IN_C and not hasattr(builtins, word)]


def missing_commands(text: str) -> list[str]:
    """scripts/x that is there and can be run; a verb that ring1 has."""
    wrong = []
    verbs: Any = get_command(cli.app)
    for line in commands(text):
        for name in re.findall(r"(?<![\w/])scripts/[\w-]+(?![\w/.-])", line):
            if not os.access(ROOT / name, os.X_OK):
                wrong.append(f"no command {name}")
        if match := re.match(r"(?:\S+=\S+ +)*(?:\.venv/bin/)?ring1 ([a-z][\w-]*)(?: ([a-z][\w-]*))?", line):
            verb = verbs.commands.get(match[1])
            below = getattr(verb, "commands", None)  # of `ring1 firewall`
            if verb is None or (below and match[2] and match[2] not in below):
                wrong.append(f"no command {match[0]}")
    return wrong


def foreign_places(text: str) -> list[str]:
    """Paths of the machine on which somebody wrote it."""
    found = re.findall(r"(?<![\w.])(?:/root|/home/\w+|/w\w+|shared)/\S*", text)
    return [f"a place of its writer's: {place}" for place in found]


def wrong_limits(text: str) -> list[str]:
    """Rows `| what | number | `module.NAME` |`."""
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| `([\w.]+)\.(\w+)` \|$", text, re.MULTILINE)
    real = [(what, number, name, getattr(importlib.import_module(module), name, None)) for what, number, module, name in rows]
    return [f"{what}: {number}, but {name} is {value}" for what, number, name, value in real if value != int(number)]


def wrong_calls_left_out(text: str) -> list[str]:
    """Each of Xen's calls is served or stands in the table of those that are not; none in both, none twice."""
    table = text[text.index("| op and name | why |") :].partition("\n\n")[0]
    left_out = [int(number) for row in table.splitlines() for number in re.findall(r"\b(\d+) [a-z]\w+", row.split("|")[1])]
    stands = left_out + sorted({op for op, _ in abi.ALL} & XEN_OPS)
    return [f"op {op} stands {stands.count(op)} times" for op in sorted(XEN_OPS | set(left_out)) if stands.count(op) != 1]


def broken_anchors(text: str) -> list[str]:
    """[title](#anchor), as anchors are made of headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return [f"no heading #{anchor}" for anchor in re.findall(r"\]\(#([^)]+)\)", text) if anchor not in anchors]


def broken_examples(text: str) -> list[str]:
    """Python is Python; what is said to be from a file stands there word for word."""
    wrong = []
    for body in examples(text):
        try:
            compile(body, "<example>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        except SyntaxError as error:
            wrong.append(f"an example is no Python: {error}")
        if match := re.match(r"# from (\S+)\n", body):
            path, words = ROOT / match[1], body[match.end() :].strip()
            if not path.exists() or words not in path.read_text():
                wrong.append(f"not in {match[1]}: {words.splitlines()[0]}")
    return wrong


EVERYWHERE: list[Rule] = [
    missing_files, missing_names, missing_classes, missing_commands, foreign_places, wrong_limits, broken_anchors,
    broken_examples,
]  # fmt: skip


# ---- the documents


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_names_only_what_is_there(name: str) -> None:
    text = (ROOT / name).read_text()
    wrong = [f"{name}: {sentence}" for rule in EVERYWHERE for sentence in rule(text)]
    assert not wrong, "\n".join(wrong)


def test_every_call_of_xens_is_served_or_left_out_with_a_reason() -> None:
    assert wrong_calls_left_out(DESIGN) == []


def test_the_rules_have_something_to_look_at() -> None:
    """A rule that finds nothing to check proves nothing."""
    assert len([item for item in quoted(DESIGN) if item.startswith(FOLDERS)]) > 50
    assert len(re.findall(r"^\| [^|]+ \| \d+ \| `", DESIGN, re.MULTILINE)) >= 8
    assert len([line for line in commands(CONTRIBUTING) if line.startswith(("scripts/", ".venv/bin/ring1"))]) >= 6
    assert len([body for body in examples(CONTRIBUTING) if body.startswith("# from ")]) >= 2
    assert {"EvtchnSend", "GrantMap", "SchedShutdown"} <= set(quoted(DESIGN)) & set(CLASSES)


MISTAKES: list[tuple[Rule, str, str]] = [
    (missing_files, "`hypervisor/frames.py`", "`hypervisor/frame.py`"),
    (missing_files, "`tests/models/`", "`tests/model/`"),
    (missing_files, "`ABI.md`", "`API.md`"),
    (missing_names, "`hypervisor.gate.boot`", "`hypervisor.gate.start`"),
    (missing_names, "`dispatch.call`", "`dispatch.invoke`"),
    (missing_names, "`NetDevice.send`", "`NetDevice.transmit`"),
    (missing_classes, "`EvtchnSend`", "`EventSend`"),
    (missing_classes, "`MonitorGone`", "`MonitorWent`"),
    (missing_commands, "`ring1 ledger`", "`ring1 inventory`"),
    (missing_commands, "`scripts/launch 20`", "`scripts/lunch 20`"),
    (foreign_places, "`hypervisor/frames.py`", "`/home/somebody/ring1/hypervisor/frames.py`"),
    (wrong_limits, "| 1024 | `hypervisor.public.types.MAX_PORTS` |", "| 1023 | `hypervisor.public.types.MAX_PORTS` |"),
    (wrong_limits, "`dom0.store.MAX_NODES`", "`dom0.store.MAX_LEAVES`"),
    (wrong_calls_left_out, "22 update_va_mapping_otherdomain", ""),
    (wrong_calls_left_out, "42 hypfs_op", "42 hypfs_op, 32 event_channel_op"),
    (broken_anchors, "(#5-memory)", "(#5-memories)"),
    (broken_examples, "```\n  ringlib  <---", "```python\n  ringlib  <---"),
]


@pytest.mark.parametrize(("rule", "old", "new"), MISTAKES, ids=[f"{rule.__name__}-{new}" for rule, _, new in MISTAKES])
def test_a_seeded_mistake_is_found(rule: Rule, old: str, new: str) -> None:
    assert old in DESIGN, "the seed's own place is gone: it would prove nothing"
    assert rule(DESIGN) == [] and rule(DESIGN.replace(old, new)) != []


def test_a_quotation_that_is_none_is_found() -> None:
    altered = CONTRIBUTING.replace('f"no virq {call.virq}"', '"no such virq"')
    assert broken_examples(altered) == ["not in hypervisor/evtchn.py: @hypercall(abi.BindVirq)"]


# ---- the worked example


def names_with(module: str, more: dict[str, Any]) -> dict[str, Any]:
    """The module's names, and those that CONTRIBUTING.md says to add to its file."""
    path = f"{module.replace('.', '/')}.py"
    (body,) = [body for body in examples(CONTRIBUTING) if body.startswith(f"# add to {path}\n")]
    names = vars(importlib.import_module(module)) | more
    exec(compile(f"from __future__ import annotations\n{body}", path, "exec"), names)
    return names


def test_a_class_and_a_function_are_a_hypercall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abi, "ALL", dict(abi.ALL))
    public = names_with("hypervisor.public.memory", {})
    kind = public["MaximumRamPage"]
    with pytest.raises(AssertionError, match=r"no handler for .*MaximumRamPage"):
        dispatch.table(core.MODULES)
    added: Any = ModuleType("hypervisor.memory")
    added.maximum_ram_page = names_with("hypervisor.memory", {"abi": SimpleNamespace(**public)})["maximum_ram_page"]
    monkeypatch.setattr(core, "MODULES", [*core.MODULES, added])

    hv = StandIn(nr_frames=512, nr_domains=2)
    try:
        guest = hv.domains[1]
        assert hv.done(guest, kind()) == 511
        hv.write(guest, ENTRY.pack(kind.OP, 0, kind.CMD, 0, 0, 0, 0, 0))
        hv.done(guest, Multicall(SCRATCH, 1))
        assert ENTRY.unpack(hv.read(guest, ENTRY.size))[1] == 511, "from a list, too"
    finally:
        hv.close()
