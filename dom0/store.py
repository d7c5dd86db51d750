"""The store: a tree of small values with owners, watches and transactions. Pure logic, no ring, no process.

`Connection.request` takes and gives the payloads of xs_wire, so that a domain over its ring and dom0 in its own process
pass through the same code. Permissions are Xen's: a node has an owner and a default letter for everybody else
(n, r, w, b), and more entries (letter, domid). dom0 may everything. A new node belongs to who made it.

Quotas, per domain but dom0: MAX_NODES, MAX_WATCHES, MAX_TRANSACTIONS, MAX_VALUE bytes, and MAX_SEEN paths that one
transaction asked for, whether they exist or not.
"""

from __future__ import annotations

import errno
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hypervisor.public.io.xs_wire import ABS_PATH_MAX, REL_PATH_MAX, XsType

MAX_NODES, MAX_WATCHES, MAX_TRANSACTIONS, MAX_VALUE, MAX_SEEN = 1000, 128, 10, 2048, 2000
PATH = re.compile(r"/(?:[A-Za-z0-9@_.:-]+(?:/[A-Za-z0-9@_.:-]+)*)?\Z")
PERM = re.compile(r"([nrwb])(\d{1,5})\Z")

Perms = tuple[tuple[str, int], ...]


class StoreRefusal(Exception):
    """A request that is answered with an errno's name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name
        self.errno: int = getattr(errno, name)


@dataclass
class Node:
    """A value, its permissions (owner first), and a generation that every change raises."""

    value: bytes = b""
    perms: Perms = (("n", 0),)
    children: set[str] = field(default_factory=set)
    generation: int = 0

    @property
    def owner(self) -> int:
        return self.perms[0][1]

    def allows(self, domid: int, want: str) -> bool:
        if domid in (0, self.owner):
            return True
        letter = next((letter for letter, who in self.perms[1:] if who == domid), self.perms[0][0])
        return letter in ("b", want)


@dataclass
class Transaction:
    """An overlay: what it read (with generations), what it would write (None: removed), and whom to tell of it, in order."""

    seen: dict[str, int] = field(default_factory=dict)
    changed: dict[str, Node | None] = field(default_factory=dict)
    fired: dict[str, None] = field(default_factory=dict)


def parent(path: str) -> str:
    return path.rsplit("/", 1)[0] or "/"


class Store:
    """The tree and everybody who is connected to it."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {"/": Node(perms=(("r", 0),))}
        self.connections: set[Connection] = set()
        self._generation = 0
        self.owned: Counter[int] = Counter({0: 1})

    # ---- the tree, through a transaction's overlay where there is one

    def get(self, path: str, tx: Transaction | None) -> Node | None:
        node = self.nodes.get(path)
        if tx is None:
            return node
        tx.seen.setdefault(path, node.generation if node else -1)
        node = tx.changed.get(path, node)
        return node if node and self._reached(path, tx) else None

    def _reached(self, path: str, tx: Transaction) -> bool:
        """All above it is there for the transaction: meanwhile others remove what is above, and make what is below."""
        while path != "/":
            path = parent(path)
            if tx.changed.get(path, self.nodes.get(path)) is None:
                return False
        return True

    def edit(self, path: str, tx: Transaction | None) -> Node:
        """The node to change; within a transaction, a copy of it."""
        node = self.get(path, tx)
        assert node is not None
        if tx is None:
            self._generation += 1
            node.generation = self._generation
        elif path not in tx.changed:
            node = Node(node.value, node.perms, set(node.children), node.generation)
            tx.changed[path] = node
        return node

    def add(self, path: str, node: Node, tx: Transaction | None) -> None:
        if tx is None:
            self._generation += 1
            node.generation = self._generation
            self.nodes[path] = node
            self.owned[node.owner] += 1
        else:
            tx.changed[path] = node

    def drop(self, path: str, tx: Transaction | None) -> dict[str, Node]:
        """The node and all below it, which a guest may have made as deep as its quota; returns them."""
        dropped: dict[str, Node] = {}
        todo = [path]
        while todo:
            at = todo.pop()
            node = self.get(at, tx)
            if node is not None:
                dropped[at] = node
                todo += [f"{at.rstrip('/')}/{name}" for name in node.children]
        for at, node in dropped.items():
            if tx is None:
                self.owned[node.owner] -= 1
                del self.nodes[at]
            else:
                tx.changed[at] = None
        return dropped

    def owned_after(self, domid: int, tx: Transaction | None) -> int:
        """Nodes that `domid` owns, once `tx` is committed."""
        count = self.owned[domid]
        for path, changed in tx.changed.items() if tx else ():
            old = self.nodes.get(path)
            count += (changed is not None and changed.owner == domid) - (old is not None and old.owner == domid)
        return count

    def commit(self, tx: Transaction) -> bool:
        """Apply, if nothing it saw has changed since; all or nothing."""
        for path, generation in tx.seen.items():
            node = self.nodes.get(path)
            if (node.generation if node else -1) != generation:
                return False
        removed: dict[str, Node] = {}
        for path, changed in tx.changed.items():
            old = self.nodes.pop(path, None)
            if old is not None:
                self.owned[old.owner] -= 1
            if changed is not None:
                self._generation += 1
                changed.generation = self._generation
                self.nodes[path] = changed
                self.owned[changed.owner] += 1
            elif old is not None:
                removed[path] = old
        for path in tx.fired:
            self.fire(path, removed)
        return True

    def fire(self, path: str, removed: Mapping[str, Node] | None = None) -> None:
        """Tell the watches at and above `path`, and those on nodes below it that were `removed`, of a change there.

        Only who may read the node is told, or might have, where it was removed: its name is news too.
        """
        removed = removed or {}
        changed = self.nodes.get(path) or removed.get(path)
        for connection in list(self.connections):
            for watched, token in list(connection.watches):
                node, told = None, path
                if watched in (path, "/") or path.startswith(watched + "/"):
                    node = changed
                elif watched.startswith(path + "/"):
                    node, told = removed.get(watched), watched
                if node is not None and node.allows(connection.domid, "r"):
                    connection.event(told, token)


class Connection:
    """One domain's (or dom0's own) access to the store."""

    def __init__(self, store: Store, domid: int, on_event: Callable[[str, str], None]) -> None:
        self.store, self.domid = store, domid
        self.event = on_event  # (absolute path, token)
        self.watches: list[tuple[str, str]] = []
        self._transactions: dict[int, Transaction] = {}
        self._next_tx = 1
        store.connections.add(self)

    def close(self) -> None:
        """Its watches and transactions go with it."""
        self.store.connections.discard(self)
        self.watches, self._transactions = [], {}

    def request(self, kind: int, tx_id: int, payload: bytes) -> bytes:  # noqa: PLR0912 - one branch a message type
        """Answer one message. Raises StoreRefusal."""
        tx = None
        if tx_id:
            tx = self._transactions.get(tx_id)
            if tx is None:
                raise StoreRefusal("ENOENT")
            if self.domid and len(tx.seen) > MAX_SEEN and kind != XsType.TRANSACTION_END:
                raise StoreRefusal("ENOSPC")
        parts = payload.split(b"\0")
        path = self._path(parts[0]) if kind not in (XsType.TRANSACTION_START, XsType.TRANSACTION_END) else "/"
        match kind:
            case XsType.READ:
                return self._readable(path, tx).value
            case XsType.DIRECTORY:
                return b"".join(name.encode() + b"\0" for name in sorted(self._readable(path, tx).children))
            case XsType.WRITE:
                self._write(path, payload.split(b"\0", 1)[1] if b"\0" in payload else b"", tx)
            case XsType.MKDIR:
                if self.store.get(path, tx) is None:
                    self._write(path, b"", tx)
            case XsType.RM:
                self._remove(path, tx)
            case XsType.GET_PERMS:
                return b"".join(f"{letter}{who}\0".encode() for letter, who in self._readable(path, tx).perms)
            case XsType.SET_PERMS:
                self._set_perms(path, [p for p in parts[1:] if p], tx)
            case XsType.WATCH:
                self._watch(path, parts)
            case XsType.UNWATCH:
                self._unwatch(path, parts)
            case XsType.TRANSACTION_START:
                return self._start()
            case XsType.TRANSACTION_END:
                self._end(tx_id, tx, parts[0] == b"T")
            case XsType.GET_DOMAIN_PATH:
                return f"/local/domain/{parts[0].decode(errors='replace')}\0".encode()
            case _:
                raise StoreRefusal("ENOSYS")
        return b"OK\0"

    # ---- one function a request

    def _path(self, raw: bytes) -> str:
        try:
            path = raw.decode("ascii")
        except UnicodeDecodeError:
            raise StoreRefusal("EINVAL") from None
        if not path.startswith("/"):
            if len(path) > REL_PATH_MAX:
                raise StoreRefusal("EINVAL")
            path = f"/local/domain/{self.domid}/{path}".rstrip("/")
        if len(path) > ABS_PATH_MAX or not PATH.match(path):
            raise StoreRefusal("EINVAL")
        return path

    def _readable(self, path: str, tx: Transaction | None) -> Node:
        node = self.store.get(path, tx)
        if node is None:
            raise StoreRefusal("ENOENT")
        if not node.allows(self.domid, "r"):
            raise StoreRefusal("EACCES")
        return node

    def _write(self, path: str, value: bytes, tx: Transaction | None) -> None:
        if len(value) > MAX_VALUE and self.domid:
            raise StoreRefusal("E2BIG")
        node = self.store.get(path, tx)
        if node is None:
            self._create(path, value, tx)
        elif not node.allows(self.domid, "w"):
            raise StoreRefusal("EACCES")
        else:
            self.store.edit(path, tx).value = value
        self._fire(path, tx)

    def _create(self, path: str, value: bytes, tx: Transaction | None) -> None:
        """With its missing parents; the nearest existing one must be ours to write."""
        missing = [path]
        while self.store.get(above := parent(missing[-1]), tx) is None:
            missing.append(above)
        base = self.store.get(above, tx)
        assert base is not None
        if not base.allows(self.domid, "w"):
            raise StoreRefusal("EACCES")
        if self.domid and self.store.owned_after(self.domid, tx) + len(missing) > MAX_NODES:
            raise StoreRefusal("ENOSPC")
        perms = base.perms if self.domid in (0, base.owner) else ((base.perms[0][0], self.domid), *base.perms[1:])
        for new in reversed(missing):
            self.store.edit(parent(new), tx).children.add(new.rsplit("/", 1)[1])
            self.store.add(new, Node(value if new == path else b"", perms), tx)

    def _remove(self, path: str, tx: Transaction | None) -> None:
        node = self.store.get(path, tx)
        if node is None:
            if self.store.get(parent(path), tx) is None:
                raise StoreRefusal("ENOENT")
            return
        if path == "/" or not node.allows(self.domid, "w"):
            raise StoreRefusal("EACCES" if path != "/" else "EINVAL")
        self.store.edit(parent(path), tx).children.discard(path.rsplit("/", 1)[1])
        removed = self.store.drop(path, tx)
        if tx is None:
            self.store.fire(path, removed)
        else:
            tx.fired[path] = None

    def _set_perms(self, path: str, raw: list[bytes], tx: Transaction | None) -> None:
        matches = [PERM.match(p.decode("ascii", "replace")) for p in raw]
        if not matches or not all(matches) or len(matches) > 16:
            raise StoreRefusal("EINVAL")
        perms = tuple((m[1], int(m[2])) for m in matches if m)
        node = self.store.get(path, tx)
        if node is None:
            raise StoreRefusal("ENOENT")
        if self.domid and (self.domid != node.owner or perms[0][1] != self.domid):
            raise StoreRefusal("EPERM")
        if tx is None:
            self.store.owned[node.owner] -= 1
            self.store.owned[perms[0][1]] += 1
        self.store.edit(path, tx).perms = perms
        self._fire(path, tx)

    def _watch(self, path: str, parts: list[bytes]) -> None:
        token = parts[1].decode("ascii", "replace") if len(parts) > 1 else ""
        if (path, token) in self.watches:
            raise StoreRefusal("EEXIST")
        if self.domid and len(self.watches) >= MAX_WATCHES:
            raise StoreRefusal("ENOSPC")
        self.watches.append((path, token))
        self.event(path, token)  # a fresh watch fires once at once

    def _unwatch(self, path: str, parts: list[bytes]) -> None:
        token = parts[1].decode("ascii", "replace") if len(parts) > 1 else ""
        if (path, token) not in self.watches:
            raise StoreRefusal("ENOENT")
        self.watches.remove((path, token))

    def _start(self) -> bytes:
        if self.domid and len(self._transactions) >= MAX_TRANSACTIONS:
            raise StoreRefusal("ENOSPC")
        tx_id = self._next_tx
        self._next_tx = tx_id % 0xFFFFFFFF + 1
        self._transactions[tx_id] = Transaction()
        return f"{tx_id}\0".encode()

    def _end(self, tx_id: int, tx: Transaction | None, commit: bool) -> None:
        if tx is None:
            raise StoreRefusal("EINVAL")
        del self._transactions[tx_id]
        if not commit:
            return
        after = self.store.owned_after(self.domid, tx)
        if self.domid and after > MAX_NODES and after > self.store.owned[self.domid]:
            raise StoreRefusal("ENOSPC")  # several transactions, each within it
        if not self.store.commit(tx):
            raise StoreRefusal("EAGAIN")

    def _fire(self, path: str, tx: Transaction | None) -> None:
        if tx is None:
            self.store.fire(path)
        else:
            tx.fired[path] = None
