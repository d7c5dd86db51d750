"""The virtual firewall-router's rules: text that dom0 keeps, a table that the switch runs. First match wins.

    default accept|drop
    accept|drop  any|udp|tcp|icmp|NUMBER  [from ADDRESS[/BITS] [port N[-M]]]  [to ADDRESS[/BITS] [port N[-M]]]
                 [in DOMAIN/INDEX]  [out DOMAIN/INDEX]                        # comment

ADDRESS may be "any". "in" is the vif a frame comes from, "out" the one it goes to; a vif that does not exist matches
nothing. A rule with a port matches no packet that shows none, such as a later fragment; 0-65535 is as if there were no
port in the rule. Without a default line the default is drop. ARP passes after the check against spoofing,
in frames of at most 60 bytes.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

PROTOCOLS = {"any": 0, "icmp": 1, "tcp": 6, "udp": 17}
ANY_PORT = (0, 65535)
NUMBER = re.compile(r"[0-9]{1,5}\Z")


class RuleError(ValueError):
    """A line that is not a rule; names the line and the word."""


@dataclass(frozen=True)
class Rule:
    """One line. Addresses and masks are numbers; a vif is "domain/index", "" for any."""

    accept: bool
    protocol: int = 0
    src: tuple[int, int] = (0, 0)
    dst: tuple[int, int] = (0, 0)
    src_port: tuple[int, int] = ANY_PORT
    dst_port: tuple[int, int] = ANY_PORT
    src_vif: str = ""
    dst_vif: str = ""
    text: str = ""


@dataclass(frozen=True)
class Policy:
    """Rules in order, then the default."""

    rules: tuple[Rule, ...] = ()
    accept_by_default: bool = False

    def compile(self, switch: Any, slot: Callable[[str], int]) -> None:
        """Write the table of a struct nswitch; slot("alice/0") is that vif's slot, or -2 where there is none."""
        for row, rule in zip(switch.rules, self.rules, strict=False):
            row.src, row.src_mask = rule.src
            row.dst, row.dst_mask = rule.dst
            row.src_port, row.dst_port = list(rule.src_port), list(rule.dst_port)
            row.src_vif = slot(rule.src_vif) if rule.src_vif else -1
            row.dst_vif = slot(rule.dst_vif) if rule.dst_vif else -1
            row.protocol, row.action, row.hits = rule.protocol, int(rule.accept), 0
        switch.nr_rules, switch.accept_by_default = len(self.rules), int(self.accept_by_default)


def parse(text: str, max_rules: int = 1024) -> Policy:
    """Raises RuleError."""
    rules: list[Rule] = []
    accept: bool | None = None
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        try:
            if words[0] == "default":
                if accept is not None:
                    raise RuleError("'default' stands twice")
                accept = _action(words[1] if len(words) > 1 else "")
                if len(words) > 2:
                    raise RuleError(f"{words[2]!r} after the default")
            else:
                rules.append(_rule(words))
        except RuleError as error:
            raise RuleError(f"line {number}: {error}") from None
    if len(rules) > max_rules:
        raise RuleError(f"{len(rules)} rules, at most {max_rules}")
    return Policy(tuple(rules), bool(accept))


def _action(word: str) -> bool:
    if word not in ("accept", "drop"):
        raise RuleError(f"{word!r} is not accept or drop")
    return word == "accept"


def _rule(words: list[str]) -> Rule:
    fields: dict[str, Any] = {"accept": _action(words[0]), "text": " ".join(words)}
    rest = iter(words[1:])
    fields["protocol"] = _protocol(_next(rest, "a protocol"))
    side = ""
    for word in rest:
        if word in ("from", "to"):
            side = {"from": "src", "to": "dst"}[word]
            _once(fields, side, _address(_next(rest, "an address")), word)
        elif word == "port":
            if not side:
                raise RuleError("a port belongs to from or to")
            if fields["protocol"] not in (6, 17):
                raise RuleError("ports are for tcp and udp")
            _once(fields, f"{side}_port", _ports(_next(rest, "a port")), word)
        elif word in ("in", "out"):
            _once(fields, {"in": "src_vif", "out": "dst_vif"}[word], _vif(_next(rest, "a vif")), word)
        else:
            raise RuleError(f"{word!r} is not from, to, port, in or out")
    return Rule(**fields)


def _next(words: Iterator[str], what: str) -> str:
    try:
        return next(words)
    except StopIteration:
        raise RuleError(f"{what} is missing at the end") from None


def _once(fields: dict[str, Any], key: str, value: Any, word: str) -> None:
    if key in fields:
        raise RuleError(f"{word!r} stands twice")
    fields[key] = value


def _protocol(word: str) -> int:
    if word in PROTOCOLS:
        return PROTOCOLS[word]
    if not NUMBER.match(word) or not 0 < int(word) < 256:
        raise RuleError(f"{word!r} is not a protocol")
    return int(word)


def _address(word: str) -> tuple[int, int]:
    if word == "any":
        return 0, 0
    try:
        network = ipaddress.IPv4Network(word, strict=False)
    except ValueError:
        raise RuleError(f"{word!r} is not an address") from None
    return int(network.network_address), int(network.netmask)


def _ports(word: str) -> tuple[int, int]:
    low, dash, high = word.partition("-")
    high = high if dash else low
    if not (NUMBER.match(low) and NUMBER.match(high)) or not int(low) <= int(high) < 65536:
        raise RuleError(f"{word!r} is not a port or a range")
    return int(low), int(high)


def _vif(word: str) -> str:
    name, slash, index = word.rpartition("/")
    if not slash or not name or not NUMBER.match(index):
        raise RuleError(f"{word!r} is not DOMAIN/INDEX")
    return word
