"""The store in a few words: a dictionary of paths, and a game in which the real one must answer, refuse and tell the same.

A transaction is judged by replay: if it commits, everything it was told must be what it would be told now, all at once; if
it is refused, somebody must have changed something meanwhile.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field

from dom0.store import Connection, Store, StoreRefusal
from hypervisor.public.io.xs_wire import XsType

NAMES = "a", "b", "c"
DOMIDS = 0, 1, 2
Answer = bytes | str  # a payload, or an errno's name
Request = tuple[XsType, str, bytes]
Event = tuple[str, str]


def parent(path: str) -> str:
    return path.rsplit("/", 1)[0] or "/"


@dataclass
class Plain:
    """path -> (value, permissions, owner first)."""

    nodes: dict[str, tuple[bytes, tuple[str, ...]]] = field(default_factory=lambda: {"/": (b"", ("r0",))})
    touched: list[str] = field(default_factory=list)  # of one request or transaction, in order

    def may(self, domid: int, path: str, want: str) -> bool:
        return allowed(self.nodes[path][1], domid, want)

    def children(self, path: str) -> list[str]:
        return sorted(p.rsplit("/", 1)[1] for p in self.nodes if p != "/" and parent(p) == path)

    def ask(self, domid: int, request: Request) -> Answer:
        kind, path, data = request
        if kind in (XsType.READ, XsType.DIRECTORY, XsType.GET_PERMS):
            return self.look(domid, kind, path)
        if kind == XsType.SET_PERMS:
            return self.set_perms(domid, path, tuple(p.decode() for p in data.split(b"\0") if p))
        if kind == XsType.RM:
            return self.remove(domid, path)
        if path in self.nodes and kind == XsType.MKDIR:
            return b"OK\0"
        return self.write(domid, path, data if kind == XsType.WRITE else b"")

    def look(self, domid: int, kind: XsType, path: str) -> Answer:
        if path not in self.nodes:
            return "ENOENT"
        if not self.may(domid, path, "r"):
            return "EACCES"
        value, perms = self.nodes[path]
        many = self.children(path) if kind == XsType.DIRECTORY else perms
        return value if kind == XsType.READ else b"".join(name.encode() + b"\0" for name in many)

    def write(self, domid: int, path: str, value: bytes) -> Answer:
        base, missing = path, list[str]()
        while base not in self.nodes:
            missing.insert(0, base)
            base = parent(base)
        if not self.may(domid, base, "w"):
            return "EACCES"
        perms = self.nodes[base][1]
        if domid and missing and perms[0][1:] != str(domid):
            perms = (f"{perms[0][0]}{domid}", *perms[1:])
        for new in missing:
            self.nodes[new] = b"", perms
        self.nodes[path] = value, self.nodes[path][1]
        self.touched.append(path)
        return b"OK\0"

    def remove(self, domid: int, path: str) -> Answer:
        if path not in self.nodes:
            return b"OK\0" if parent(path) in self.nodes else "ENOENT"
        if path == "/" or not self.may(domid, path, "w"):
            return "EINVAL" if path == "/" and self.may(domid, path, "w") else "EACCES" if path != "/" else "EINVAL"
        for below in [p for p in self.nodes if p == path or p.startswith(path + "/")]:
            del self.nodes[below]
        self.touched.append(path)
        return b"OK\0"

    def set_perms(self, domid: int, path: str, perms: tuple[str, ...]) -> Answer:
        if path not in self.nodes:
            return "ENOENT"
        if domid and (self.nodes[path][1][0][1:] != str(domid) or perms[0][1:] != str(domid)):
            return "EPERM"
        self.nodes[path] = self.nodes[path][0], perms
        self.touched.append(path)
        return b"OK\0"


def allowed(perms: tuple[str, ...], domid: int, want: str) -> bool:
    if str(domid) in ("0", perms[0][1:]):
        return True
    letter = next((p[0] for p in perms[1:] if p[1:] == str(domid)), perms[0][0])
    return letter in ("b", want)


@dataclass
class Open:
    """A transaction: its number, its own view, what it asked and was told, when it began."""

    number: int
    view: Plain
    began: int
    log: list[tuple[Request, Answer]] = field(default_factory=list)


class Game:
    """A real store and a plain one; three domains with a connection each."""

    def __init__(self) -> None:
        self.store, self.plain, self.version = Store(), Plain(), 0
        self.told: dict[int, list[Event]] = {domid: [] for domid in DOMIDS}
        self.wanted: dict[int, list[Event]] = {domid: [] for domid in DOMIDS}
        self.watches: dict[int, list[Event]] = {domid: [] for domid in DOMIDS}
        self.open: dict[int, Open] = {}
        self.at: dict[int, Connection] = {
            domid: Connection(self.store, domid, lambda path, token, domid=domid: self.told[domid].append((path, token)))
            for domid in DOMIDS
        }
        self.commits = self.conflicts = 0
        for domid in DOMIDS[1:]:
            self.both(0, (XsType.MKDIR, f"/{NAMES[domid]}", b""))
            self.both(0, (XsType.SET_PERMS, f"/{NAMES[domid]}", f"n{domid}\0".encode()))

    def real(self, domid: int, request: Request, tx: int = 0) -> Answer:
        kind, path, data = request
        try:
            return self.at[domid].request(kind, tx, path.encode() + b"\0" + data)
        except StoreRefusal as refusal:
            return refusal.name

    # ---- moves

    def both(self, domid: int, request: Request) -> None:
        """Outside any transaction."""
        before = dict(self.plain.nodes)
        answer = self.plain.ask(domid, request)
        assert self.real(domid, request) == answer, f"{domid}: {request}"
        self.happened(before)

    def inside(self, domid: int, request: Request) -> None:
        """Within the domain's transaction, where it has one."""
        if tx := self.open.get(domid):
            answer = self.real(domid, request, tx.number)
            tx.log.append((request, answer))

    def start(self, domid: int) -> None:
        if domid not in self.open:
            number = int(self.at[domid].request(XsType.TRANSACTION_START, 0, b"\0").rstrip(b"\0"))
            self.open[domid] = Open(number, copy.deepcopy(self.plain), self.version)

    def finish(self, domid: int, commit: bool) -> None:
        if not (tx := self.open.pop(domid, None)):
            return
        try:
            self.at[domid].request(XsType.TRANSACTION_END, tx.number, b"T\0" if commit else b"F\0")
        except StoreRefusal as refusal:
            assert refusal.name == "EAGAIN" and self.version != tx.began, "refused, and nothing had changed"
            self.conflicts += 1
            return
        if commit:
            before = dict(self.plain.nodes)
            for request, answer in tx.log:
                assert self.plain.ask(domid, request) == answer, f"committed, and {request} would now be answered otherwise"
            self.commits += 1
            self.happened(before)

    def watch(self, domid: int, path: str, token: str) -> None:
        watch = path, token
        answer = self.real(domid, (XsType.WATCH, path, token.encode() + b"\0"))
        if watch in self.watches[domid]:
            assert answer == "EEXIST"
        else:
            assert answer == b"OK\0"
            self.watches[domid].append(watch)
            self.wanted[domid].append(watch)

    def unwatch(self, domid: int, path: str, token: str) -> None:
        watch = path, token
        answer = self.real(domid, (XsType.UNWATCH, path, token.encode() + b"\0"))
        assert answer == (b"OK\0" if watch in self.watches[domid] else "ENOENT")
        if watch in self.watches[domid]:
            self.watches[domid].remove(watch)

    # ---- what must hold

    def happened(self, before: dict[str, tuple[bytes, tuple[str, ...]]]) -> None:
        """Whoever may know is told of what was touched, once."""
        nodes, touched = self.plain.nodes, dict.fromkeys(self.plain.touched)
        self.plain.touched.clear()
        self.version += bool(touched)
        for path in touched:
            for domid in DOMIDS:
                for watched, token in self.watches[domid]:
                    told = path if watched in (path, "/") or path.startswith(watched + "/") else watched
                    here = nodes.get(path) or before.get(path) if told == path else None
                    if told == watched and watched.startswith(path + "/") and watched not in nodes:
                        here = before.get(watched)
                    if here and allowed(here[1], domid, "r"):
                        self.wanted[domid].append((told, token))

    def check(self) -> None:
        real = {path: (n.value, tuple(f"{p}{d}" for p, d in n.perms)) for path, n in self.store.nodes.items()}
        assert real == self.plain.nodes, "the trees differ"
        for path, node in self.store.nodes.items():
            assert sorted(node.children) == self.plain.children(path), f"children of {path}"
        for domid in DOMIDS:
            owned = sum(perms[0][1:] == str(domid) for _, perms in self.plain.nodes.values())
            assert self.store.owned[domid] == owned, f"nodes of domain {domid}"
            assert self.told[domid] == self.wanted[domid], f"what domain {domid} was told"
            self.told[domid].clear()
            self.wanted[domid].clear()


def paths(rng: random.Random) -> str:
    return "".join(f"/{rng.choice(NAMES)}" for _ in range(rng.randrange(1, 4))) if rng.random() < 0.97 else "/"


def requests(rng: random.Random) -> Request:
    """Any request for the tree."""
    path = paths(rng)
    match rng.randrange(10):
        case 0 | 1 | 2:
            return XsType.WRITE, path, rng.choice((b"", b"x", b"y\0z"))
        case 3:
            return XsType.MKDIR, path, b""
        case 4:
            return XsType.RM, path, b""
        case 5:
            perms = [f"{rng.choice('nrwb')}{rng.choice(DOMIDS)}" for _ in range(rng.randrange(1, 4))]
            return XsType.SET_PERMS, path, "".join(f"{p}\0" for p in perms).encode()
        case 6:
            return XsType.GET_PERMS, path, b""
        case 7:
            return XsType.DIRECTORY, path, b""
        case _:
            return XsType.READ, path, b""


def play(game: Game, moves: int) -> None:
    rng = random.Random(12)
    for _ in range(moves):
        domid = rng.choice(DOMIDS)
        match rng.randrange(12):
            case 0:
                game.start(domid)
            case 1:
                game.finish(domid, rng.random() < 0.9)
            case 2:
                game.watch(domid, paths(rng), rng.choice("pq"))
            case 3:
                game.unwatch(domid, paths(rng), rng.choice("pq"))
            case 4 | 5 | 6 | 7:
                game.inside(domid, requests(rng))
            case _:
                game.both(domid, requests(rng))
        game.check()
