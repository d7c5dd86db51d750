"""Hostile frontends: a ring, a request or a node of the store that cannot be closes what it belongs to, with a reason."""

from __future__ import annotations

import struct
import time

import pytest

from dom0.devices import DETACH_SECONDS
from domain.backend import MAX_KEPT
from tests.system.machine import Guest, Machine, machine, until

pytestmark = pytest.mark.usefixtures("undisturbed")

READ_DATA = struct.pack("<IIII", 2, 1, 0, 5) + b"data\0"  # a request of the store


# ---- rings


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("console out_prod", "console ring violated: the writer's index cannot be"),
        ("console in_cons", "console ring violated: the reader's index cannot be"),
        ("store req_prod", "store ring violated: the writer's index cannot be"),
        ("store rsp_cons", "store ring violated: the reader's index cannot be"),
    ],
)
def test_an_index_that_cannot_be_closes_that_connection(host: Machine, eve: Guest, index: str, reason: str) -> None:
    """With a reason in the list and in the log; she herself lives on and can be destroyed."""
    assert violation(host, eve, index) == reason
    assert host.ask("dmesg").count(f"(dom0) eve: {reason}") == 1
    assert eve.row()["state"] == "running"
    eve.destroy()


def violation(host: Machine, eve: Guest, index: str, seconds: float = 5.0) -> str:
    """What the list says of eve once she broke that index, asked something of its owner, and rang."""
    eve.begin(f"""
        kernel.store._out.write({READ_DATA!r})
        push({index!r}, 0x7fffffff)
        while True:
            kernel.call(evtchn.EvtchnSend(kernel.start.store_evtchn))
            kernel.call(evtchn.EvtchnSend(kernel.start.console_evtchn))
    """)

    def reason() -> str:
        eve.type(b"keys for her")  # else there is nothing that her console's owner would look for room for
        return str(eve.row()["reason"])

    return until(reason, seconds)


def test_a_dom0_that_believes_an_index_is_found_out() -> None:
    """Seed: a ring that is violated reads as an empty one."""
    with machine(seed="rings_are_believed") as host:
        assert violation(host, host.guest("eve"), "store req_prod", 1.0) == ""


@pytest.mark.parametrize(
    ("device", "index", "value"),
    [
        ("disk", "disk._page.address", 1000),
        ("disk", "disk._page.address", 0xFFFFFF00),
        ("net", "net._pages[0].address", 1000),
        ("net", "net._pages[1].address", 1_000_000),
    ],
)
def test_a_device_ring_that_is_broken_closes_that_device(host: Machine, device: str, index: str, value: int) -> None:
    """With a reason; the other device of the same domain, and the devices of others, go on."""
    eve, carol = owner(host, "eve", "10.0.0.1"), owner(host, "carol", "10.0.0.2")
    carol.do("await net.send([stack._arp(1, bytes([255] * 6), bytes(6), bytes(4))])  # one of eve's buffers is used up")
    assert until(lambda: [row for row in host.ask("info", name="eve")["counters"] if row.get("rx_packets")])
    eve.do(f"poke({index}, {value}); kernel.call(evtchn.EvtchnSend({device}._port))")
    name = {"disk": "xvda", "net": "eth0"}[device]
    assert until(lambda: eve.row()["reason"]).startswith(f"{name}: the frontend's ")
    assert until(lambda: eve.do(f"return {device}.error")) == "the backend closed"
    assert f"(dom0) eve: {name}: the frontend's " in host.ask("dmesg")
    for guest in [carol] if device == "net" else [eve, carol]:
        assert guest.do("await net.send([bytes(60)]); return net.error") == ""
    for guest in [carol] if device == "disk" else [eve, carol]:
        guest.do("await disk.write(8, b'fine' * 1024); await disk.flush()")
        assert host.holds(f"{guest.name}.img", 4096, b"fine" * 1024)
    for guest in (eve, carol):
        guest.destroy()


def owner(host: Machine, name: str, ip: str) -> Guest:
    """A domain with a disk and an interface, both connected."""
    disk = {"name": "xvda", "image": str(host.disk(f"{name}.img")), "mode": "w"}
    guest = host.guest(name, memory=4, disk=[disk], vif=[{"ip": ip}])
    guest.do("""
        global disk, net, stack
        import domain.udp
        disk, net = await kernel.block(), await kernel.net()
        stack = domain.udp.Udp.__new__(domain.udp.Udp)  # for its messages alone: it does not take frames
        stack.device, stack._ip = net, bytes([10, 0, 0, 2])
        await disk.write(0, bytes(512))
    """)
    return guest


def test_requests_that_are_wrong_in_themselves(host: Machine) -> None:
    """Each is answered with an error, moves nothing, and the disk goes on."""
    content = b"kept" * 1024
    image = host.disk("wrong.img", 1 << 20, content)
    eve = host.guest("eve", memory=4, disk=[{"name": "xvda", "image": str(image), "mode": "r", "extents": "0:16"}])
    eve.do("global disk; disk = await kernel.block()")
    answers = eve.do("""
        async def ask(op, nr, handle, sector, segments):
            slot = await disk._take()
            slot.op, slot.status = op, None
            slot.answered.clear()
            request = blkif.HEAD.pack(op, nr, handle, slot.ident, sector)
            request += b"".join(blkif.SEGMENT.pack(*segment) for segment in segments)
            if disk._ring.publish(request.ljust(blkif.REQUEST_BYTES, b"\\0")):
                kernel.evtchn.send(disk._port)
            await slot.answered.wait()
            disk._free.put(slot)
            return slot.status

        good = (disk._slots[0].grefs[0], 0, 7)
        h = disk.handle
        return [
            await ask(0, 1, h, 0, [good]),
            await ask(1, 1, h, 0, [good]),
            await ask(0, 1, h, 16, [good]), await ask(0, 1, h, 9, [good]), await ask(0, 1, h, (1 << 64) - 1, [good]),
            await ask(0, 0, h, 0, []), await ask(0, 12, h, 0, [good] * 11), await ask(0, 255, h, 0, [good] * 11),
            await ask(0, 1, h + 1, 0, [good]),
            await ask(0, 1, h, 0, [(good[0], 5, 4)]), await ask(0, 1, h, 0, [(good[0], 0, 8)]),
            await ask(0, 1, h, 0, [(4096, 0, 7)]), await ask(0, 1, h, 0, [(0, 0, 7)]), await ask(0, 1, h, 0, [(3000, 0, 7)]),
            await ask(7, 1, h, 0, [good]), await ask(255, 1, h, 0, [good]),
            await ask(0, 1, h, 0, [good]),
        ]
    """)
    assert answers == [0, *[-1] * 13, -2, -2, 0]
    assert host.holds("wrong.img", 0, content)
    assert host.row("blkback")["state"] == "running" and not eve.row()["reason"]
    eve.destroy()


def test_a_backend_keeps_no_more_than_its_share(host: Machine) -> None:
    """She grants one page two thousand times and reads into each: what is past the share is refused, and others have theirs."""
    before = host.books()
    eve = owner(host, "eve", "10.0.0.1")
    assert greedy_reads(eve) == (MAX_KEPT, 2000 - MAX_KEPT)
    carol = owner(host, "carol", "10.0.0.2")
    carol.do("await disk.write(0, bytes(1 << 20))  # all of her disk: 256 pages of her pool")
    for guest in (eve, carol):
        guest.destroy()
    assert not host.balances(before)


def greedy_reads(eve: Guest) -> tuple[int, int]:
    """Of 2000 reads into a page each: how many were done, how many refused."""
    done, refused = eve.do("""
        page, queue, count = kernel.memory.alloc(1), [], [0, 0]
        first = disk._slots[0]
        refs = [kernel.grants.give(disk.otherend_id, page.pfn) for _ in range(1999)]
        # the pool's page that `owner` wrote from is the backend's already
        for ref in [first.grefs[0], *refs]:
            slot = await disk._take()
            slot.op, slot.status = 0, None
            slot.answered.clear()
            request = blkif.HEAD.pack(0, 1, disk.handle, slot.ident, 0) + blkif.SEGMENT.pack(ref, 0, 7)
            if disk._ring.publish(request.ljust(blkif.REQUEST_BYTES, b"\\0")):
                kernel.evtchn.send(disk._port)
            await slot.answered.wait()
            disk._free.put(slot)
            count[slot.status != 0] += 1
        return count
    """)
    return done, refused


def test_a_backend_that_keeps_all_it_is_given_is_found_out() -> None:
    """Seed: there is no share."""
    with machine(seed="no_share") as host:
        assert greedy_reads(owner(host, "eve", "10.0.0.1")) == (2000, 0)


FRONTENDS = [
    "ring-ref 99999999999999",
    "ring-ref -1",
    "ring-ref ²",
    "event-channel 1208925819614629174706176",
    "event-channel 0",
    "ring-ref 0",
    "state ²",
    "state 99",
    "state \xff",
]


@pytest.mark.parametrize("nonsense", FRONTENDS)
def test_what_she_writes_into_the_store_is_only_text(host: Machine, nonsense: str) -> None:
    """It closes her device; the driver domain, which reads it, goes on."""
    driver = host.row("blkback")["pid"]
    eve = publish(host, *nonsense.split())
    assert until(lambda: eve.do('return await kernel.store.get(await kernel.store.read(path + "backend") + "/state")') == "6")
    assert host.row("blkback")["pid"] == driver
    eve.destroy()


def publish(host: Machine, key: str, value: str) -> Guest:
    """A guest who publishes a disk's ring and event channel as she should, but for one value."""
    raw = b"\xff\xfe" if value == "\xff" else value.encode()
    eve = host.guest("eve", memory=4, disk=[{"name": "xvda", "image": str(host.disk("eve.img"))}])
    eve.do(f"""
        global path
        path = "device/vbd/51712/"
        page = kernel.memory.alloc(1)
        await kernel.store.write(path + "ring-ref", kernel.grants.give({host.row("blkback")["domid"]}, page.pfn))
        await kernel.store.write(path + "event-channel", kernel.call(evtchn.AllocUnbound(types.DOMID_SELF, 1)))
        await kernel.store._request(XsType.WRITE, (path + {key!r}).encode() + b"\\0" + {raw!r})
        if {key!r} != "state":
            await kernel.store.write(path + "state", 3)
    """)
    return eve


def test_a_driver_domain_that_believes_her_numbers_is_found_out() -> None:
    """Seed: they are converted as they stand. It ends, and with it everybody's disks."""
    with machine(seed="numbers_are_believed") as host:
        driver = host.row("blkback")["pid"]
        publish(host, "ring-ref", "99999999999999")
        assert until(lambda: host.row("blkback")["pid"] != driver)


def test_nodes_that_the_backend_may_not_read(host: Machine) -> None:
    """She hides her state: the backend sees nothing more of her, until the toolstack takes the device away, without delay."""
    driver = host.row("netback")["pid"]
    eve = host.guest("eve", memory=4, vif=[{"ip": "10.0.0.1"}])
    eve.do(f"""
        await kernel.net()
        await kernel.store.set_perms("device/vif/0/state", ["n{eve.domid}"])
        await kernel.store.write("device/vif/0/state", 5)
    """)
    began = time.monotonic()
    eve.destroy()
    assert time.monotonic() - began < DETACH_SECONDS
    assert host.row("netback")["pid"] == driver


# ---- the store


def test_the_store_s_limits_hold(host: Machine, eve: Guest) -> None:
    """Depth, nodes, watches, transactions: each ends with a refusal, and her end takes all of it away."""
    deep = eve.do("""
        path, n = "data", 0
        try:
            while True:
                path += "/a"
                await kernel.store.mkdir(path)
                n += 1
        except Exception as error:
            return n, error.name
    """)
    assert 900 < deep[0] < 1000 and deep[1] == "ENOSPC"
    assert eve.do("""
        out = []
        for attack in (lambda: kernel.store.watch("data"), lambda: kernel.store._request(XsType.TRANSACTION_START, b"\\0")):
            n = 0
            try:
                while n < 2000:
                    await attack()
                    n += 1
            except Exception as error:
                out.append((n, error.name))
        return out
    """) == [[126, "ENOSPC"], [10, "ENOSPC"]], "two watches are her kernel's own"
    assert eve.do("""
        tx = 1  # of the ten that are open
        try:
            for n in range(3000):
                await kernel.store.get(f"data/none{n}", tx=tx)
        except Exception as error:
            return n, error.name
    """) == [2001, "ENOSPC"], "a transaction remembers what it looked for, no more than this"
    nodes = host.ask("ledger")["store_nodes"]
    assert nodes > 1000
    eve.destroy()
    assert host.ask("ledger")["store_nodes"] < nodes - 900


def test_she_writes_nothing_that_is_not_hers(host: Machine, eve: Guest, bob: Guest) -> None:
    his = f"/local/domain/{bob.domid}"
    for path in (
        "/x", "/local/domain/0/name", f"{his}/data/x", f"{his}/control/shutdown", "/local/domain/1/data/ready",
        "/local/domain/2/data/firewall", "name", "domid", "device/vbd/51712/x",
    ):  # fmt: skip
        refusal = eve.do(f"""
            try:
                await kernel.store.write({path!r}, "mine")
            except Exception as error:
                return error.name
        """)
        assert refusal == "EACCES", path
    assert host.row("bob")["state"] == "running"


def test_a_store_that_asks_nobody_is_found_out() -> None:
    """Seed: there are no permissions. Eve ends bob as the toolstack does."""
    with machine(seed="the_store_is_open") as host:
        eve, bob = host.guest("eve"), host.guest("bob")
        eve.do(f'await kernel.store.write("/local/domain/{bob.domid}/control/shutdown", "poweroff")')
        assert bob.wait().reason == "poweroff"


def answers_during_a_flood(eve: Guest, bob: Guest) -> int:
    """How often bob's console answers in half a second of eve's requests to the store, their replies thrown away unread."""
    eve.begin(f"""
        request = {READ_DATA!r}
        out, replies, port = kernel.store._out, kernel.store._in, kernel.store._port
        buffer, sent, looks = request * 80, 0, 0
        while True:
            sent += out.write(buffer[sent % len(request):][:1000])
            replies.read()
            looks += 1
            if looks % 256 == 1:  # whoever empties the ring as long as it is full needs no more
                kernel.call(evtchn.EvtchnSend(port))
    """)
    end, answers = time.monotonic() + 0.5, 0
    while time.monotonic() < end and bob.speaks("return 1", 0.5):
        answers += 1
    return answers


def test_a_flood_of_store_requests_leaves_dom0_time_for_others(eve: Guest, bob: Guest) -> None:
    assert answers_during_a_flood(eve, bob) > 50
    eve.destroy()


def test_a_dom0_that_empties_one_ring_first_is_found_out() -> None:
    """Seed: it reads on in a domain's store ring as long as something comes."""
    with machine(seed="greedy_store") as host:
        assert answers_during_a_flood(host.guest("eve"), host.guest("bob")) < 50
        host.hypervisor.kill()
        assert host.hypervisor.ended()
