"""The store: tree, permissions, watches, transactions, quotas; against a dictionary, and against guests that mean no good."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dom0 import store as module
from dom0.store import MAX_NODES, MAX_SEEN, MAX_TRANSACTIONS, MAX_VALUE, MAX_WATCHES, Connection, Node, Store, StoreRefusal
from hypervisor.public.io.xs_wire import PAYLOAD_MAX, XsType
from tests.conftest import NIGHTLY
from tests.models.tree import DOMIDS, NAMES, Game, play, requests

MOVES = 200_000 if NIGHTLY else 20_000
FUZZ = 200_000 if NIGHTLY else 20_000


class Guest:
    """A connection, as its domain would use it; every answer decoded."""

    def __init__(self, store: Store, domid: int) -> None:
        self.events: list[tuple[str, str]] = []
        self.connection = Connection(store, domid, lambda path, token: self.events.append((path, token)))

    def ask(self, kind: int, *parts: str, tx: int = 0) -> str:
        payload = b"\0".join(part.encode() for part in parts)
        return self.connection.request(kind, tx, payload).decode(errors="replace")

    def write(self, path: str, value: str = "", tx: int = 0) -> None:
        self.ask(XsType.WRITE, path, value, tx=tx)

    def begin(self) -> int:
        return int(self.ask(XsType.TRANSACTION_START, "").rstrip("\0"))

    def commit(self, tx: int) -> None:
        self.ask(XsType.TRANSACTION_END, "T", "", tx=tx)

    def refused(self, name: str, kind: int, *parts: str, tx: int = 0) -> None:
        with pytest.raises(StoreRefusal) as caught:
            self.ask(kind, *parts, tx=tx)
        assert caught.value.name == name

    def news(self) -> list[tuple[str, str]]:
        news, self.events[:] = list(self.events), []
        return news


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def dom0(store: Store) -> Guest:
    """Which made homes for domains 1 and 2."""
    made = Guest(store, 0)
    for domid in (1, 2):
        made.write(f"/local/domain/{domid}")
        made.ask(XsType.SET_PERMS, f"/local/domain/{domid}", f"n{domid}", "")
    return made


@pytest.fixture
def one(store: Store, dom0: Guest) -> Guest:
    return Guest(store, 1)


@pytest.fixture
def two(store: Store, dom0: Guest) -> Guest:
    return Guest(store, 2)


# ---- against a dictionary


def test_a_long_game_agrees_with_the_model() -> None:
    game = Game()
    play(game, MOVES)
    assert game.commits > 100 and game.conflicts > 50


class Machine(RuleBasedStateMachine):
    """The same, played by Hypothesis."""

    who = st.sampled_from(DOMIDS)
    seed = st.integers(0, 10**6)
    path = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map(lambda names: "/" + "/".join(names))

    @initialize()
    def begin(self) -> None:
        self.game = Game()

    @rule(who=who, seed=seed)
    def both(self, who: int, seed: int) -> None:
        self.game.both(who, requests(random.Random(seed)))

    @rule(who=who, seed=seed)
    def inside(self, who: int, seed: int) -> None:
        self.game.start(who)
        self.game.inside(who, requests(random.Random(seed)))

    @rule(who=who, commit=st.booleans())
    def finish(self, who: int, commit: bool) -> None:
        self.game.finish(who, commit)

    @rule(who=who, path=path)
    def watch(self, who: int, path: str) -> None:
        self.game.watch(who, path, "t")

    @rule(who=who, path=path)
    def unwatch(self, who: int, path: str) -> None:
        self.game.unwatch(who, path, "t")

    @invariant()
    def check(self) -> None:
        if hasattr(self, "game"):
            self.game.check()


TestMachine = Machine.TestCase


def blind_commit(self: Store, tx: module.Transaction) -> bool:
    """Nothing it saw is looked at again."""
    tx.seen = {path: node.generation if (node := self.nodes.get(path)) else -1 for path in tx.seen}
    return COMMIT(self, tx)


def lazy_commit(self: Store, tx: module.Transaction) -> bool:
    """What it looked for and did not find is not looked for again."""
    tx.seen = {path: generation for path, generation in tx.seen.items() if generation != -1}
    return COMMIT(self, tx)


def forgets_below(self: Store, path: str, removed: Mapping[str, Node] | None = None) -> None:
    """Watches below what was removed are told nothing."""
    FIRE(self, path, {path: removed[path]} if removed and path in removed else None)


def tells_everybody(self: Store, path: str, removed: Mapping[str, Node] | None = None) -> None:
    """Names of removed nodes are told to those who could not read them."""
    FIRE(self, path, {p: Node(perms=(("b", 0),)) for p in removed or {}})


COMMIT, FIRE = Store.commit, Store.fire
DEFECTS: dict[str, tuple[Any, str, Any]] = {
    "a commit does not look": (Store, "commit", blind_commit),
    "a commit forgets what was absent": (Store, "commit", lazy_commit),
    "a removal is not told below": (Store, "fire", forgets_below),
    "a removal is told to all": (Store, "fire", tells_everybody),
    "a permission too many": (Node, "allows", lambda self, domid, want: domid in (0, self.owner) or self.perms[0][0] != "n"),
    "half a removal is seen": (Store, "_reached", lambda self, path, tx: True),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_game_finds_a_seeded_defect(monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    monkeypatch.setattr(*DEFECTS[defect])
    with pytest.raises(AssertionError):
        play(Game(), MOVES)


# ---- paths and permissions


@pytest.mark.parametrize(
    "path", ["//", "/a//b", "/a/", "/a b", "/\u00fc", "/a\n", "/" + "x" * 3072, "y" * 2049, "/a/*", "/a\x7f"], ids=repr
)
def test_a_path_that_is_none(one: Guest, path: str) -> None:
    for kind in (XsType.READ, XsType.WRITE, XsType.MKDIR, XsType.RM, XsType.WATCH, XsType.DIRECTORY, XsType.SET_PERMS):
        one.refused("EINVAL", kind, path, "")


def test_relative_paths_are_under_the_domains_home(one: Guest, dom0: Guest) -> None:
    one.write("data/x", "1")
    assert dom0.ask(XsType.READ, "/local/domain/1/data/x", "") == "1" == one.ask(XsType.READ, "data/x", "")
    assert one.ask(XsType.GET_DOMAIN_PATH, "7", "") == "/local/domain/7\0"
    one.write("", "home")
    assert dom0.ask(XsType.READ, "/local/domain/1", "") == "home"


def test_a_guest_has_its_home_and_no_more(one: Guest, two: Guest) -> None:
    for path in ("/", "/local", "/local/domain", "/local/domain/2", "/tool", "/local/domain/2/x", "/local/domain/3"):
        one.refused("EACCES", XsType.WRITE, path, "x")
    for path in ("/local", "/local/domain", "/local/domain/2"):
        one.refused("EACCES", XsType.RM, path, "")
    one.refused("EINVAL", XsType.RM, "/", "")
    one.write("secret", "s")
    two.refused("EACCES", XsType.READ, "/local/domain/1/secret", "")
    two.refused("EACCES", XsType.DIRECTORY, "/local/domain/1", "")


def test_permissions_are_given_by_the_owner(one: Guest, two: Guest) -> None:
    secret = "/local/domain/1/secret"
    one.write("secret", "s")
    one.refused("EPERM", XsType.SET_PERMS, "secret", "n2", "")
    one.ask(XsType.SET_PERMS, "secret", "n1", "r2", "")
    assert two.ask(XsType.READ, secret, "") == "s" and two.ask(XsType.GET_PERMS, secret, "") == "n1\0r2\0"
    two.refused("EACCES", XsType.WRITE, secret, "x")
    two.refused("EPERM", XsType.SET_PERMS, secret, "n2", "")
    one.ask(XsType.SET_PERMS, "secret", "w1", "")
    two.write(secret, "x")
    two.refused("EACCES", XsType.READ, secret, "")


@pytest.mark.parametrize("perms", ["", "x1", "n", "n-1", "n1 ", "r123456", "\u0661", "n1\0" + "r2\0" * 16], ids=repr)
def test_permissions_that_are_none(one: Guest, perms: str) -> None:
    one.write("x")
    one.refused("EINVAL", XsType.SET_PERMS, "x", perms, "")


def test_what_the_store_does_not_know(one: Guest) -> None:
    for kind in (0, 8, 9, 15, 16, 17, 20, 99, 0xFFFFFFFF):
        one.refused("ENOSYS", kind, "x", "")
    one.refused("ENOENT", XsType.READ, "x", "", tx=7)
    one.refused("EINVAL", XsType.TRANSACTION_END, "T", "")


# ---- watches


def test_watches(one: Guest, two: Guest, dom0: Guest) -> None:
    one.ask(XsType.WATCH, "a", "t", "")
    assert one.news() == [("/local/domain/1/a", "t")], "a fresh one fires"
    one.refused("EEXIST", XsType.WATCH, "a", "t", "")
    one.write("a/b/c", "1")
    one.write("ab")
    one.ask(XsType.RM, "a/b", "")
    assert one.news() == [("/local/domain/1/a/b/c", "t"), ("/local/domain/1/a/b", "t")]
    one.ask(XsType.UNWATCH, "a", "t", "")
    one.refused("ENOENT", XsType.UNWATCH, "a", "t", "")
    one.write("a/x")
    assert one.news() == []
    two.ask(XsType.WATCH, "/", "all", "")
    two.news()
    two.connection.close()
    dom0.write("/x")
    assert two.news() == []


def test_a_guest_is_not_told_of_what_it_may_not_read(one: Guest, two: Guest, dom0: Guest) -> None:
    """Not of its name either, and not when it goes."""
    two.ask(XsType.WATCH, "/", "all", "")
    two.news()
    one.write("secret/name", "1")
    one.ask(XsType.RM, "secret", "")
    tx = dom0.begin()
    dom0.ask(XsType.RM, "/local/domain/1", "", tx=tx)
    dom0.commit(tx)
    assert two.news() == []


@pytest.mark.parametrize("transacted", [False, True])
def test_a_removal_is_told_to_those_below_too(one: Guest, dom0: Guest, transacted: bool) -> None:
    dom0.write("/local/domain/1/device/vbd/1/state", "4")
    one.ask(XsType.WATCH, "device/vbd/1/state", "s", "")
    one.news()
    tx = dom0.begin() if transacted else 0
    dom0.ask(XsType.RM, "/local/domain/1/device", "", tx=tx)
    if tx:
        assert one.news() == []
        dom0.commit(tx)
    assert one.news() == [("/local/domain/1/device/vbd/1/state", "s")]


# ---- transactions


def test_a_transaction_is_all_or_nothing(one: Guest, dom0: Guest) -> None:
    one.write("n", "1")
    tx = one.begin()
    one.write("n", "2", tx)
    one.write("m", "3", tx)
    assert one.ask(XsType.READ, "n", "", tx=tx) == "2" and dom0.ask(XsType.READ, "/local/domain/1/n", "") == "1"
    one.commit(tx)
    assert one.ask(XsType.DIRECTORY, "", "") == "m\0n\0"
    tx = one.begin()
    one.write("n", "4", tx)
    one.ask(XsType.TRANSACTION_END, "F", "", tx=tx)
    assert one.ask(XsType.READ, "n", "") == "2"
    one.refused("ENOENT", XsType.READ, "n", "", tx=tx)


@pytest.mark.parametrize("meanwhile", ["n", "absent", "dir/new", "dir"])
def test_what_it_saw_must_not_have_changed(one: Guest, dom0: Guest, meanwhile: str) -> None:
    one.write("n", "1")
    one.write("dir/x", "1")
    tx = one.begin()
    one.ask(XsType.READ, "n", "", tx=tx)
    one.refused("ENOENT", XsType.READ, "absent", "", tx=tx)
    one.ask(XsType.DIRECTORY, "dir", "", tx=tx)
    one.write("out", "1", tx)
    dom0.write(f"/local/domain/1/{meanwhile}", "9")
    one.refused("EAGAIN", XsType.TRANSACTION_END, "T", "", tx=tx)
    one.refused("ENOENT", XsType.READ, "out", "")


def test_a_transaction_lives_through_whatever_others_do_meanwhile(one: Guest, dom0: Guest) -> None:
    """Removed below it, made below what it removed: it is refused at its end, and nothing breaks before."""
    one.write("a/b/c", "1")
    first, second = one.begin(), one.begin()
    one.write("a/b/c", "2", first)
    one.ask(XsType.RM, "a", "", tx=second)
    dom0.ask(XsType.RM, "/local/domain/1/a", "")
    for kind in (XsType.READ, XsType.DIRECTORY, XsType.RM, XsType.MKDIR, XsType.WRITE, XsType.RM):
        try:
            one.ask(kind, "a/b/c", "", tx=first)
        except StoreRefusal as refusal:
            assert refusal.name == "ENOENT"
    dom0.write("/local/domain/1/a/b/d", "3")
    one.refused("ENOENT", XsType.READ, "a/b/d", "", tx=second)
    one.refused("ENOENT", XsType.RM, "a/b/d", "", tx=second)
    for tx in (first, second):
        one.refused("EAGAIN", XsType.TRANSACTION_END, "T", "", tx=tx)


# ---- quotas, and what a guest might do with depth and width


def test_a_guest_has_so_many_nodes(one: Guest, dom0: Guest, store: Store) -> None:
    for i in range(MAX_NODES - 1):  # its home is one
        one.write(f"n{i}")
    one.refused("ENOSPC", XsType.WRITE, "more", "")
    one.refused("ENOSPC", XsType.MKDIR, "x/y/z", "")
    one.write("n5", "changing one is no new one")
    dom0.write("/local/domain/1/dom0s", "may")
    one.ask(XsType.RM, "n1", "")
    one.ask(XsType.RM, "n2", "")
    one.write("more")
    one.refused("ENOSPC", XsType.WRITE, "and/more", "")
    assert store.owned[1] == MAX_NODES


def test_several_transactions_are_one_guests(one: Guest, store: Store) -> None:
    """Each within the quota, and disjoint, so that none conflicts with another."""
    for i in range(3):
        one.write(f"d{i}")
    numbers = [one.begin() for _ in range(3)]
    for i, tx in enumerate(numbers):
        for j in range(400):
            one.write(f"d{i}/n{j}", tx=tx)
    one.commit(numbers[0])
    one.commit(numbers[1])
    one.refused("ENOSPC", XsType.TRANSACTION_END, "T", "", tx=numbers[2])
    assert store.owned[1] <= MAX_NODES


def test_one_transaction_counts_what_it_makes_and_what_it_removes(one: Guest, store: Store) -> None:
    for i in range(909):
        one.write(f"n{i}")
    tx = one.begin()
    for i in range(90):
        one.write(f"m{i}", tx=tx)
    one.refused("ENOSPC", XsType.WRITE, "x", "", tx=tx)
    one.ask(XsType.RM, "n7", "", tx=tx)
    one.write("x", tx=tx)
    one.refused("ENOSPC", XsType.WRITE, "y", "", tx=tx)
    one.commit(tx)
    assert store.owned[1] == MAX_NODES


def test_watches_transactions_values(one: Guest, dom0: Guest) -> None:
    for i in range(MAX_WATCHES):
        one.ask(XsType.WATCH, f"w{i}", "t", "")
    one.refused("ENOSPC", XsType.WATCH, "x", "t", "")
    numbers = [one.begin() for _ in range(MAX_TRANSACTIONS)]
    one.refused("ENOSPC", XsType.TRANSACTION_START, "")
    one.commit(numbers[3])
    one.begin()
    one.write("v", "x" * MAX_VALUE)
    one.refused("E2BIG", XsType.WRITE, "v", "x" * (MAX_VALUE + 1))
    dom0.write("/v", "x" * (MAX_VALUE + 1))


def test_a_transaction_may_not_hoard(one: Guest) -> None:
    """Every path that it asks for is kept until its end: that is bounded too, and so is what it will tell."""
    tx = one.begin()
    for _ in range(5000):
        one.write("same", tx=tx)
    with pytest.raises(StoreRefusal) as caught:
        for i in range(MAX_SEEN + 10):
            try:
                one.ask(XsType.READ, f"x{i}", "", tx=tx)
            except StoreRefusal as refusal:
                if refusal.name != "ENOENT":
                    raise
    assert caught.value.name == "ENOSPC"
    transaction = one.connection._transactions[tx]
    assert len(transaction.seen) <= MAX_SEEN + 1 and len(transaction.fired) == 1
    one.commit(tx)


@pytest.mark.parametrize("transacted", [False, True])
def test_a_tree_as_deep_as_the_quota_is_taken_away(one: Guest, dom0: Guest, store: Store, transacted: bool) -> None:
    """dom0 must not run out of stack where a guest chose the depth."""
    one.write("/".join(["a"] * 990), "deep")
    before = len(store.nodes)
    tx = dom0.begin() if transacted else 0
    dom0.ask(XsType.RM, "/local/domain/1", "", tx=tx)
    if tx:
        dom0.commit(tx)
    assert len(store.nodes) == before - 991 and store.owned[1] == 0
    one.refused("EACCES", XsType.WRITE, "x", "")


def test_no_bytes_of_a_guest_get_anything_but_a_refusal(one: Guest, store: Store) -> None:
    rng = random.Random(14)
    words = [b"a", b"a/b", b"/local/domain/1/x", b"/", b"", b"n1", b"r2", b"T", b"F", b"\xff", b"t", b"../x", b"@releaseDomain"]
    for i in range(FUZZ):
        payload = b"\0".join(rng.choice(words) for _ in range(rng.randrange(5)))
        if rng.random() < 0.2:
            payload = rng.randbytes(rng.randrange(64))
        numbers = list(one.connection._transactions)
        try:
            kind, tx = rng.randrange(18), rng.choice([0, 0, *numbers, rng.randrange(1 << 32)])
            assert isinstance(one.connection.request(kind, tx, payload[:PAYLOAD_MAX]), bytes)
        except StoreRefusal as refusal:
            assert refusal.errno > 0
        if i % 100 == 0:
            assert all(module.parent(path) in store.nodes for path in store.nodes)
