"""The tree itself: who imports whom, how long a file may be, what must stand in which column.

    ringlib  <-  hypervisor.public  <-  hypervisor.*
                         ^
                         +-----------   domain.*   <-   dom0.*

Every rule reports what breaks it as `file: what`, all of it at once.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ringlib", "hypervisor", "domain", "dom0")
MAX_LINES = 450

# A module may import what starts with one of these, the standard library and declared packages; the first prefix that
# matches a module's own name rules.
MAY_IMPORT = {
    "ringlib": ("ringlib",),
    "hypervisor.public": ("hypervisor.public", "ringlib"),
    "hypervisor": ("hypervisor", "ringlib"),
    "domain": ("domain", "hypervisor.public", "ringlib"),
    "dom0": ("dom0", "domain", "hypervisor.public", "ringlib"),
}
EXCEPT = {
    ("hypervisor.gate.boot", "domain.kernel"),  # a process starts in the hypervisor; its last step enters the guest
    ("hypervisor.public.errors", "os"),  # strerror, the host's words for a status
}
# What a contract has no use for: it says, and does nothing.
NOT_IN_PUBLIC = {"os", "signal", "mmap", "socket", "subprocess", "fcntl", "ctypes", "cffi", "posix_ipc", "asyncio"}
THREADS = {"threading", "_thread", "concurrent", "multiprocessing", "asyncio"}

# Same word, same file name, in every column that has a part in it (section 4 of DESIGN.md; a guest's own words may differ).
MATRIX = {
    "memory": ("hypervisor", "domain"),
    "evtchn": ("hypervisor", "domain"),
    "grant": ("hypervisor", "domain"),
    "console": ("hypervisor", "domain"),
    "sched": ("hypervisor", "domain"),
    "domctl": ("hypervisor",),
    "sysctl": ("hypervisor",),
    "version": ("hypervisor",),
    "traps": ("hypervisor",),
    "io/xenbus": ("domain",),
}


def sources(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    """Files that people wrote, sorted; what cffi generates (_x.c) is not among them."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return sorted(p for p in paths if p.suffix in suffixes and not (p.suffix == ".c" and p.name.startswith("_")))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sources(*PACKAGES)}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def show(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(module: str, node: ast.AST) -> Iterator[str]:
    """Full dotted names imported anywhere in `node`; `from a import b` is a.b where that is a module, else a."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}: relative import, line {child.lineno}"
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                yield full if full in MODULES else str(child.module)
        elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
            yield from (arg.value for arg in child.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def test_imports_go_one_way() -> None:
    wrong = []
    for module, path in MODULES.items():
        allowed = next(prefixes for owner, prefixes in MAY_IMPORT.items() if within(module, (owner,)))
        for name in imports(module, tree(path)):
            if within(name, PACKAGES) and not within(name, allowed) and (module, name) not in EXCEPT:
                wrong.append(f"{module} -> {name}")
    assert not wrong, "\n".join(wrong)


def test_other_packages_are_the_declared_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^A-Za-z0-9_]", line)[0] for line in project["dependencies"]}
    wrong = []
    for module, path in MODULES.items():
        for name in imports(module, tree(path)):
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top not in declared and top not in PACKAGES:
                wrong.append(f"{module} -> {name}")
    assert not wrong, "\n".join(wrong)


def test_the_contract_only_says() -> None:
    wrong = [
        f"{module} -> {name}"
        for module, path in MODULES.items()
        if within(module, ("hypervisor.public",))
        for name in imports(module, tree(path))
        if name.split(".")[0] in NOT_IN_PUBLIC and (module, name) not in EXCEPT
    ]
    assert not wrong, "\n".join(wrong)


def runtime(node: ast.Module) -> ast.Module:
    """Without what only the type checker reads (`if TYPE_CHECKING:`)."""
    kept = [n for n in node.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))]
    return ast.Module(kept, [])


def test_no_cycles() -> None:
    edges = {
        module: sorted({name for name in imports(module, runtime(tree(path))) if name in MODULES and name != module})
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        for name in edges[module]:
            if cycle := visit(name, [*trail, module]):
                return cycle
        done.add(module)
        return []

    for module in edges:
        assert not (cycle := visit(module, [])), " -> ".join(cycle)


def test_files_fit_a_sitting() -> None:
    files = sources(*PACKAGES, suffixes=(".py", ".c", ".h", ".pyi"))
    lengths = {show(path): len(path.read_text().splitlines()) for path in files}
    wrong = [f"{name}: {lines} lines, at most {MAX_LINES}" for name, lines in lengths.items() if lines > MAX_LINES]
    assert not wrong, "\n".join(wrong)


def test_every_module_says_what_it_is() -> None:
    wrong = [show(p) for p in sources(*PACKAGES, "tests", "scripts") if not ast.get_docstring(tree(p))]
    assert not wrong, "no docstring: " + ", ".join(wrong)


def test_every_public_name_of_the_contract_is_explained() -> None:
    """By its docstring, by comments on its members, or by name in the module's docstring (the tree of errors)."""
    wrong = []
    for module, path in MODULES.items():
        if within(module, ("hypervisor.public",)):
            text, parsed = path.read_text(), tree(path)
            for node in parsed.body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                    commented = "#" in (ast.get_source_segment(text, node) or "")
                    listed = re.search(rf"\b{node.name}\b", ast.get_docstring(parsed) or "")
                    if not (ast.get_docstring(node) or commented or listed):
                        wrong.append(f"{module}.{node.name}")
    assert not wrong, "no docstring: " + ", ".join(wrong)


def test_shared_memory_is_never_mapped_as_a_structure() -> None:
    """A ctypes structure over memory that the peer writes invites a second read of a checked field."""
    wrong = []
    for path in sources(*PACKAGES, "scripts"):
        for node in ast.walk(tree(path)):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if name in ("Structure", "LittleEndianStructure", "BigEndianStructure"):
                wrong.append(f"{show(path)}:{getattr(node, 'lineno', 0)}: {name}")
    assert not wrong, "\n".join(wrong)


def test_the_hypervisor_has_one_thread() -> None:
    wrong = [
        f"{module} -> {name}"
        for module, path in MODULES.items()
        if within(module, ("hypervisor",))
        for name in imports(module, tree(path))
        if name.split(".")[0] in THREADS
    ]
    wrong += [show(p) for p in sources("hypervisor", suffixes=(".c", ".h")) if "pthread_create" in p.read_text()]
    assert not wrong, "\n".join(wrong)


def test_tests_never_sleep() -> None:
    wrong = []
    for path in sources("tests"):
        for node in ast.walk(tree(path)):
            slept = isinstance(node, ast.Attribute) and ast.unparse(node) == "time.sleep"
            if slept or (isinstance(node, ast.ImportFrom) and ast.unparse(node).startswith("from time import sleep")):
                wrong.append(f"{show(path)}:{getattr(node, 'lineno', 0)}: wait for what you mean, with TIMEOUT")
    assert not wrong, "\n".join(wrong)


def test_the_matrix() -> None:
    """What public says under a name, each column does under the same name."""
    wrong = [f"hypervisor/public/{word}.py" for word in MATRIX if not (ROOT / f"hypervisor/public/{word}.py").exists()]
    for word, columns in MATRIX.items():
        wrong += [f"{c}/{word}.py" for c in columns if not (ROOT / c / f"{word.removeprefix('io/')}.py").exists()]
    assert not wrong, "missing: " + ", ".join(wrong)


def test_every_call_is_served_where_it_is_declared() -> None:
    """A request class of hypervisor/public/x.py has its function in hypervisor/x.py; Multicall is dispatch itself."""
    wrong = []
    for module, path in MODULES.items():
        if within(module, ("hypervisor.public",)):
            calls = [n.name for n in tree(path).body if isinstance(n, ast.ClassDef) and _is_call(n)]
            handler = ROOT / "hypervisor" / path.name
            served = {"Multicall"} | (_served(handler) if handler.exists() else set())
            wrong += [f"{show(path)}: {call}, not in {show(handler)}" for call in calls if call not in served]
    assert not wrong, "\n".join(wrong)


def _is_call(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).startswith("Hypercall[") for base in node.bases)


def _served(path: Path) -> set[str]:
    """Names that stand in `@hypercall(Name)` or `@hypercall(abi.Name)`."""
    return {
        ast.unparse(mark.args[0]).split(".")[-1]
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef)
        for mark in node.decorator_list
        if isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith("hypercall") and mark.args
    }


def test_tests_mirror_the_packages() -> None:
    """tests/hypervisor/test_evtchn.py questions hypervisor/evtchn.py, or a C file, folder or document (GUIDE.md) so named."""
    wrong = []
    for package in PACKAGES:
        names = [path.name.lower() for path in (ROOT / package).rglob("*")]
        for path in sorted((ROOT / "tests" / package).rglob("test_*.py")):
            subject = path.stem.removeprefix("test_")
            if not any(name.startswith(subject) for name in names):
                wrong.append(f"{show(path)}: no {package}/{subject}.py")
    assert not wrong, "\n".join(wrong)
