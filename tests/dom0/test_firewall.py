"""The firewall: rules as text, and the judge in C against a matcher in Python that reads the same text by itself."""

from __future__ import annotations

import ipaddress
import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dom0 import _net, firewall
from dom0.firewall import ANY_PORT, Policy, Rule, RuleError, parse
from tests.conftest import NIGHTLY
from tests.models.mutant import library

PACKETS = 200_000 if NIGHTLY else 20_000
SLOTS = {"alice/0": 0, "bob/0": 1, "bob/1": 2}

# ---- the text


def test_a_policy_reads_as_it_is_written() -> None:
    policy = parse(
        """
        # what alice may say
        default accept
        drop   udp from 10.0.0.0/8 port 53-80 to 10.1.2.3 port 7 in alice/0 out bob/1   # not this
        accept 47  to any
        accept any
        """
    )
    assert policy.accept_by_default and [rule.accept for rule in policy.rules] == [False, True, True]
    first = policy.rules[0]
    assert (first.src, first.src_port) == ((10 << 24, 0xFF000000), (53, 80))
    assert (first.dst, first.dst_port) == ((0x0A010203, 0xFFFFFFFF), (7, 7))
    assert (first.protocol, first.src_vif, first.dst_vif) == (17, "alice/0", "bob/1")
    assert policy.rules[1].protocol == 47 and policy.rules[2] == Rule(True, text="accept any")
    assert parse("") == Policy() and not Policy().accept_by_default


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("allow any", "'allow' is not accept or drop"),
        ("accept", "a protocol is missing"),
        ("accept tcpp", "'tcpp' is not a protocol"),
        ("accept 256", "'256' is not a protocol"),
        ("accept \u00b2", "'\u00b2' is not a protocol"),
        ("accept " + "9" * 5000, "is not a protocol"),
        ("accept any from", "an address is missing"),
        ("accept any from 10.0.0.256", "'10.0.0.256' is not an address"),
        ("accept any from 10.0.0.0/33", "'10.0.0.0/33' is not an address"),
        ("accept any from ::1", "'::1' is not an address"),
        ("accept any from any from any", "'from' stands twice"),
        ("accept tcp port 5", "a port belongs to from or to"),
        ("accept any from any port 5", "ports are for tcp and udp"),
        ("accept icmp to any port 5", "ports are for tcp and udp"),
        ("accept tcp to any port", "a port is missing"),
        ("accept tcp to any port 65536", "'65536' is not a port"),
        ("accept tcp to any port 5-", "'5-' is not a port"),
        ("accept tcp to any port -5", "'-5' is not a port"),
        ("accept tcp to any port 9-5", "'9-5' is not a port"),
        ("accept tcp to any port 1-2-3", "'1-2-3' is not a port"),
        ("accept tcp to any port \u0665", "'\u0665' is not a port"),
        ("accept tcp to any port 5 port 6", "'port' stands twice"),
        ("accept any in", "a vif is missing"),
        ("accept any in alice", "'alice' is not DOMAIN/INDEX"),
        ("accept any out /0", "'/0' is not DOMAIN/INDEX"),
        ("accept any out bob/x", "'bob/x' is not DOMAIN/INDEX"),
        ("accept any via bob/0", "'via' is not from, to, port, in or out"),
        ("default", "'' is not accept or drop"),
        ("default maybe", "'maybe' is not accept or drop"),
        ("default drop all", "'all' after the default"),
        ("default accept\ndefault drop", "'default' stands twice"),
    ],
)
def test_an_error_names_its_line_and_its_word(line: str, said: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse(f"# a comment\naccept any\n{line}\naccept any\n")
    number = 3 + line.count("\n")
    assert f"line {number}: " in str(caught.value) and said in str(caught.value)


def test_there_are_so_many_rules(net: tuple[Any, Any]) -> None:
    text = "accept any\n" * 1024
    assert len(parse(text).rules) == 1024 == net[1].SWITCH_RULES
    with pytest.raises(RuleError, match="1025 rules, at most 1024"):
        parse(text + "drop any\n")


def test_no_text_gets_anything_but_a_policy_or_an_error() -> None:
    rng = random.Random(15)
    text = "accept drop default any tcp udp icmp from to port in out # 5 5-6 - / 1.2.3.4 1.2.3.4/8 alice/0 \u00b2 \u0665 0x5 +1"
    words = [*text.split(), "\n", "\n"]
    for _ in range(5000):
        try:
            parse(" ".join(rng.choice(words) for _ in range(rng.randrange(14))))
        except RuleError:
            pass


# ---- the judge


@pytest.fixture(scope="module")
def net() -> tuple[Any, Any]:
    return _net.ffi, _net.lib


ADDRESSES = ["10.0.0.1", "10.0.0.2", "10.0.1.1", "192.168.7.7", "10.128.0.1", "0.0.0.0"]
PORTS = [0, 1, 53, 80, 81, 1024, 65535]


def random_line(rng: random.Random) -> str:
    """A rule, as a user would write it."""
    protocol = rng.choice(["any", "tcp", "udp", "icmp", "47", "6"])
    words = [rng.choice(["accept", "drop"]), protocol]
    for side in rng.sample(["from", "to"], rng.randrange(3)):
        bits = rng.choice(["", "", "/32", "/24", "/9", "/8", "/0"])
        words += [side, rng.choice(["any", rng.choice(ADDRESSES) + bits])]
        if protocol in ("tcp", "udp", "6") and rng.random() < 0.6:
            low, high = sorted(rng.sample(PORTS, 2))
            words += ["port", rng.choice([str(low), f"{low}-{high}", f"{high}-{high}"])]
    for way in rng.sample(["in", "out"], rng.choice((0, 0, 1, 2))):
        words += [way, rng.choice([*SLOTS, "carol/0"])]
    return " ".join(words)


@dataclass
class Packet:
    """What a frame says; `bytes` makes it one. Lengths may lie."""

    type: int
    version: int
    ihl: int
    total: int
    fragment: int
    protocol: int
    src: str
    dst: str
    ports: tuple[int, int]
    size: int
    source: int
    to: int

    def frame(self) -> bytes:
        head = struct.pack(
            ">BBHHHBBH4s4s", self.version << 4 | self.ihl, 0, self.total, 1, self.fragment, 64, self.protocol, 0,
            ipaddress.IPv4Address(self.src).packed, ipaddress.IPv4Address(self.dst).packed,
        )  # fmt: skip
        body = head + b"\x01" * max(0, self.ihl * 4 - 20)
        body = body[: self.ihl * 4] if self.ihl >= 5 else body
        frame = bytes(12) + struct.pack(">H", self.type) + body + struct.pack(">HH", *self.ports)
        return frame.ljust(1600, b"\x07")[: self.size]


def random_packet(rng: random.Random) -> Packet:
    ihl = rng.choice((5, 5, 5, 6, 15, 4, 0))
    total = max(ihl, 5) * 4 + rng.choice((0, 4, 7, 8, 20, 1000))
    return Packet(
        rng.choice([0x0800] * 12 + [0x0806, 0x86DD, 0x8100]), rng.choice((4, 4, 4, 4, 4, 6)), ihl,
        rng.choice((total, total, total, total, total + 5, 3, 65535)),
        rng.choice((0, 0, 0, 0, 0x4000, 0x2000, 1, 0x1FFF, 0x2001)), rng.choice((6, 17, 1, 47)), rng.choice(ADDRESSES),
        rng.choice(ADDRESSES), (rng.choice(PORTS), rng.choice(PORTS)), rng.choice([14 + total] * 8 + [1514, 60, 33, 34, 14]),
        rng.randrange(3), rng.randrange(3),
    )  # fmt: skip


def wants(packet: Packet) -> tuple[str, bool]:
    """("arp" | "bad" | "ip", whether its ports can be seen), by the lengths alone."""
    copied = min(packet.size, 128)
    if packet.type == 0x0806:
        return ("arp" if packet.size <= 60 else "bad"), False
    header = packet.ihl * 4
    whole = copied >= 34 and packet.version == 4 and header >= 20 and 14 + header <= copied
    if packet.type != 0x0800 or not whole or packet.total < header or 14 + packet.total > packet.size:
        return "bad", False
    first = not packet.fragment & 0x1FFF
    seen = packet.total >= header + 8 and copied >= 14 + header + 8
    return "ip", packet.protocol in (6, 17) and first and seen


def matches(line: str, packet: Packet, seen: bool) -> bool:
    """The rule's words, one after the other, each a condition."""
    words = line.split()[1:]
    protocol = {"any": None, "tcp": 6, "udp": 17, "icmp": 1}.get(words[0], 0)
    if protocol is not None and packet.protocol != (protocol or int(words[0])):
        return False
    side = ""
    for word, value in zip(words[1::2], words[2::2], strict=True):
        if word in ("from", "to"):
            side = word
            address = ipaddress.IPv4Address(packet.src if word == "from" else packet.dst)
            if value != "any" and address not in ipaddress.IPv4Network(value, strict=False):
                return False
        elif word == "port":
            low, _, high = value.partition("-")
            every = (low, high) == ("0", "65535")  # as if no port were named: what shows none matches too
            if not every and not (seen and int(low) <= packet.ports[side == "to"] <= int(high or low)):
                return False
        elif SLOTS.get(value, -5) != (packet.source if word == "in" else packet.to):
            return False
    return True


class Expected:
    """The judge in Python: verdict and counters."""

    def __init__(self, lines: list[str], accept: bool) -> None:
        self.lines, self.accept = lines, accept
        self.hits = [0] * len(lines)
        self.default_hits = self.malformed = 0

    def judge(self, packet: Packet) -> int:
        kind, seen = wants(packet)
        if kind == "arp":
            return 1
        if kind == "bad":
            self.malformed += 1
            return 0
        for i, line in enumerate(self.lines):
            if matches(line, packet, seen):
                self.hits[i] += 1
                return int(line.startswith("accept"))
        self.default_hits += 1
        return int(self.accept)


def compare(ffi: Any, lib: Any, packets: int) -> None:
    """Random policies, random packets."""
    rng, switch = random.Random(16), ffi.new("struct nswitch *")
    verdicts = set()
    for _ in range(packets // 50):
        lines, accept = [random_line(rng) for _ in range(rng.randrange(9))], rng.random() < 0.5
        text = "\n".join([*lines, f"default {'accept' if accept else 'drop'}"])
        parse(text).compile(switch, lambda name: SLOTS.get(name, -2))
        switch.default_hits = switch.malformed = 0
        expected = Expected(lines, accept)
        for _ in range(50):
            packet = random_packet(rng)
            frame = packet.frame()
            found = lib.firewall_judge(switch, frame, min(len(frame), 128), len(frame), packet.source, packet.to)
            assert found == expected.judge(packet), f"{packet}\n{text}"
            verdicts.add(found)
        assert [switch.rules[i].hits for i in range(len(lines))] == expected.hits, "hits"
        assert (switch.default_hits, switch.malformed) == (expected.default_hits, expected.malformed), "counters"
    assert verdicts == {0, 1}


def test_the_judge_agrees_with_the_text(net: tuple[Any, Any]) -> None:
    compare(*net, PACKETS)


DEFECTS = {
    "a port is compared with <": ("range[0] <= port && port <= range[1]", "range[0] <= port && port < range[1]"),
    "a fragment has ports": ("!(be16(h + 20) & 0x1fff) && ", ""),
    "a short header has ports": ("total >= ihl + 8 && ", ""),
    "a packet may be longer than its frame": (" || 14 + total > size", ""),
    "a header may be longer than the packet": ("total < ihl || ", ""),
    "a short header is a header": ("ihl < 20 || ", ""),
    "the mask is not used": ("((k->dst ^ r->dst) & r->dst_mask)", "(k->dst ^ r->dst)"),
    "source and destination are mixed up": ("in(r->src_port, k->src_port)", "in(r->src_port, k->dst_port)"),
    "a rule for another vif matches": ("(r->dst_vif != -1 && r->dst_vif != to)", "0"),
    "any version is four": (" || h[14] >> 4 != 4", ""),
    "a rule is not counted": ("sw->rules[i].hits++;", ";"),
    "the default is to accept": ("sw->accept_by_default ? RULE_ACCEPT : RULE_DROP", "RULE_ACCEPT"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_seeded_defect_is_found(tmp_path: Path, defect: str) -> None:
    changed = library(tmp_path / "switch.so", "dom0/switch.h", ["dom0/switch.c"], {"dom0/switch.c": [DEFECTS[defect]]})
    with pytest.raises(AssertionError):
        compare(*changed, PACKETS)


def test_a_vif_that_is_not_there_matches_nothing(net: tuple[Any, Any]) -> None:
    ffi, lib = net
    switch = ffi.new("struct nswitch *")
    parse("drop any in carol/0\ndrop any out carol/0\ndefault accept").compile(switch, lambda name: SLOTS.get(name, -2))
    frame = random_packet(random.Random(1)).frame()
    for slot in range(-1, 64):
        lib.firewall_judge(switch, frame, len(frame), len(frame), slot, slot)
    assert not switch.rules[0].hits and not switch.rules[1].hits
    assert firewall.ANY_PORT == ANY_PORT == (0, 65535)


def test_arp_carries_nothing_past_the_rules(net: tuple[Any, Any]) -> None:
    """A frame that says ARP and is longer than ARP with its padding is judged as nonsense, whatever the rules."""
    ffi, lib = net
    switch = ffi.new("struct nswitch *")
    switch.accept_by_default = 1
    for size, verdict in ((42, lib.RULE_ACCEPT), (60, lib.RULE_ACCEPT), (61, lib.RULE_DROP), (1514, lib.RULE_DROP)):
        frame = (bytes(12) + b"\x08\x06").ljust(size, b"\1")
        assert lib.firewall_judge(switch, frame, min(size, 128), size, 0, 1) == verdict, size
    assert switch.malformed == 2
