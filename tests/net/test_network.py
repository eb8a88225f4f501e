"""Nodes on machines of their own: cables are pulled, addresses change, packets are lost."""

import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from lab import Host, Lab, Switch, is_multicast
from tiny_model import write_model
from up import Node, Nodes, together, until

from covey.control.join_code import JoinCode

CODE = JoinCode(bytes(16)).text()
NAMES = ("ada", "bob", "cleo")
SEEN_AGAIN_S_MAX = 15.0
AWAY_S_MAX = 3.5  # 3 s are promised of a node that died; and the test looks every 50 ms


def trio(net: Lab, lan: Switch, count: int = 2) -> list[Host]:
    return [net.host(name, lan, f"10.77.0.{number}/24") for number, name in enumerate(NAMES[:count], 1)]


def apart(nodes: list[Node], timeout_s: float = AWAY_S_MAX) -> float:
    """Seconds until every node saw itself alone."""
    return until(lambda: all(node.visible() == {node.name} for node in nodes), timeout_s)


def test_nodes_with_one_code_find_each_other(net: Lab, nodes: Nodes) -> None:
    up = nodes.up(*trio(net, net.switch(), 3), code=CODE)
    assert together(up) < 5
    assert all(node.notices() == [] for node in up)


@pytest.mark.net
def test_a_partition_heals(net: Lab, nodes: Nodes) -> None:
    lan = net.switch()
    up = nodes.up(*trio(net, lan), code=CODE)
    together(up)
    lan.ports[1].cut = True
    apart(up)
    time.sleep(8)  # both sides have given up their connections
    lan.ports[1].cut = False
    together(up, SEEN_AGAIN_S_MAX)


@pytest.mark.net
def test_a_slow_and_lossy_network_is_still_one(net: Lab, nodes: Nodes) -> None:
    """100 ms there and 100 ms back, and every twentieth packet lost."""
    lan = net.switch()
    lan.delay_s, lan.loss = 0.1, 0.05
    up = nodes.up(*trio(net, lan), code=CODE)
    together(up, 20)
    seen = [all(len(node.visible()) == 2 for node in up) for _ in range(50) if time.sleep(0.2) is None]
    assert seen.count(False) <= 2  # five heartbeats in a row that are late or lost


def test_a_node_that_can_only_dial_out_holds_a_part_of_a_model(net: Lab, nodes: Nodes) -> None:
    """A firewall lets nothing in that nobody inside asked for."""
    lan = net.switch()
    hosts = trio(net, lan)
    behind = lan.ports[1]
    lan.allows = lambda frame, _, target: target is not behind or not (is_multicast(frame) or opens_connection(frame))
    (ada,) = nodes.up(hosts[0], code=CODE)
    (bob,) = nodes.up(hosts[1], code=CODE, peers=("10.77.0.1",))
    together([ada, bob])
    model = str(write_model(net.home / "model.gguf", layers=4))
    ada.post("/place_instance", {"model_id": model, "min_nodes": 2})
    until(lambda: ada.runner_states() == ["Ready"] * 2, 30, ada.runner_states)
    for node in (ada, bob):
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 20,
            "ignore_eos": True,
        }
        assert node.post("/v1/chat/completions", body)["usage"]["completion_tokens"] == 20


def opens_connection(frame: bytes) -> bool:
    """Whether it is the first packet of a TCP connection."""
    kind = int.from_bytes(frame[12:14], "big")
    protocol, start = {
        0x0800: (frame[23], 14 + 4 * (frame[14] & 0xF)),
        0x86DD: (frame[20], 54),
    }.get(kind, (0, 0))
    syn, ack = 0x02, 0x10
    return protocol == 6 and frame[start + 13] & (syn | ack) == syn


@pytest.mark.net
def test_an_interface_that_goes_down_and_comes_back(net: Lab, nodes: Nodes) -> None:
    hosts = trio(net, net.switch())
    up = nodes.up(*hosts, code=CODE)
    together(up)
    hosts[1].ip("link set e0 down")
    apart(up)
    time.sleep(5)
    hosts[1].ip("link set e0 up")
    together(up, SEEN_AGAIN_S_MAX)


def test_another_address_while_requests_stream(net: Lab, nodes: Nodes) -> None:
    """The router hands out another address; what runs on the machine goes on."""
    hosts = trio(net, net.switch())
    (bob,) = nodes.up(hosts[1], code=CODE)
    model = place(bob, write_model(net.home / "model.gguf", layers=4))
    up = [*nodes.up(hosts[0], code=CODE), bob]
    together(up)
    runners = runner_processes(bob)
    with asking(bob, model) as answers:
        hosts[1].ip("addr del 10.77.0.2/24 dev e0")
        hosts[1].address("10.77.0.99/24")
        time.sleep(AWAY_S_MAX)  # what was seen before would be away by now
        together(up, SEEN_AGAIN_S_MAX - AWAY_S_MAX)
    assert len(answers) > 2
    assert all(answer.endswith("data: [DONE]\n\n") and "error" not in answer for answer in answers)
    assert runner_processes(bob) == runners


@contextmanager
def asking(node: Node, model: str) -> Generator[list[str]]:
    """Requests one after the other, while the block runs; what each streamed."""
    answers: list[str] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "stream": True}
            with node.posting("/v1/chat/completions", body | {"max_tokens": 200}) as response:
                answers.append(response.read().decode())

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        yield answers
    finally:
        is_over.set()
        asker.join(60)


def place(node: Node, model: Path) -> str:
    """While it is alone. Returns the model's name."""
    node.post("/place_instance", {"model_id": str(model)})
    until(lambda: node.runner_states() == ["Ready"], 30)
    return str(model)


def runner_processes(node: Node) -> set[int]:
    children = psutil.Process(node.process.pid).children(recursive=True)
    return {child.pid for child in children if "covey.engine" in child.cmdline()}


@pytest.mark.net
def test_from_one_interface_to_another(net: Lab, nodes: Nodes) -> None:
    """A laptop is plugged in, and then its Wi-Fi is switched off."""
    lan = net.switch()
    hosts = trio(net, lan)
    up = nodes.up(*hosts, code=CODE)
    together(up)
    lan.plug(hosts[1], "e1")
    hosts[1].address("10.77.0.52/24", "e1")
    time.sleep(1)
    hosts[1].ip("link set e0 down")
    time.sleep(3)  # what was seen before is away by now
    together(up, SEEN_AGAIN_S_MAX - 3)


@pytest.mark.net
def test_an_interface_that_appears_after_the_start(net: Lab, nodes: Nodes) -> None:
    lan = net.switch()
    hosts = [net.host("ada", lan, "10.77.0.1/24"), net.host("bob")]
    up = nodes.up(*hosts, code=CODE)
    lan.plug(hosts[1])
    hosts[1].address("10.77.0.2/24")
    together(up, SEEN_AGAIN_S_MAX)


@pytest.mark.net
def test_a_laptop_that_sleeps(net: Lab, nodes: Nodes) -> None:
    up = nodes.up(*trio(net, net.switch()), code=CODE)
    together(up)
    asleep = [psutil.Process(up[1].process.pid), *psutil.Process(up[1].process.pid).children(recursive=True)]
    for process in asleep:
        process.send_signal(signal.SIGSTOP)
    until(lambda: up[0].visible() == {"ada"}, AWAY_S_MAX)
    time.sleep(11)
    for process in asleep:
        process.send_signal(signal.SIGCONT)
    together(up, SEEN_AGAIN_S_MAX)


def test_ipv6_alone(net: Lab, nodes: Nodes) -> None:
    lan = net.switch()
    hosts = [net.host(name, lan, f"fd77::{number}/64") for number, name in enumerate(NAMES, 1)]
    up = nodes.up(*hosts, code=CODE)
    together(up, SEEN_AGAIN_S_MAX)


@pytest.mark.net
def test_a_vpn_without_multicast_needs_the_name_of_one_peer(net: Lab, nodes: Nodes) -> None:
    """The third one names the first, and learns of the second through it."""
    vpn = net.switch()
    vpn.allows = lambda frame, *_: not is_multicast(frame)
    hosts = [net.host(name, vpn, f"100.64.0.{number}/10") for number, name in enumerate(NAMES, 1)]
    up = nodes.up(hosts[0], code=CODE)
    up += nodes.up(*hosts[1:], code=CODE, peers=("100.64.0.1",))
    together(up, SEEN_AGAIN_S_MAX)


@pytest.mark.net
def test_a_member_that_can_only_dial_out(net: Lab, nodes: Nodes) -> None:
    """It is behind a router: the others can't begin a connection to it."""
    lan = net.switch()
    hosts = trio(net, lan, 3)
    lan.allows = lambda frame, _, target: not (is_multicast(frame) or (target.host is hosts[2] and is_tcp_start(frame)))
    up = nodes.up(*hosts[:2], code=CODE, peers=("10.77.0.1", "10.77.0.2"))
    together(up, SEEN_AGAIN_S_MAX)
    up += nodes.up(hosts[2], code=CODE, peers=("10.77.0.1",))
    together(up, SEEN_AGAIN_S_MAX)


def is_tcp_start(frame: bytes) -> bool:
    """The first packet of a TCP connection over IPv4: SYN without ACK."""
    return frame[12:14] == b"\x08\x00" and frame[23] == 6 and frame[47] & 0x12 == 0x02


@pytest.mark.net
def test_two_that_only_see_a_third(net: Lab, nodes: Nodes) -> None:
    """Messages are not passed on: who has no way to another does not call it visible, and nothing is placed across."""
    left, right = net.switch(), net.switch()
    middle = net.host("bob", left, "10.77.0.2/24")
    right.plug(middle, "e1")
    middle.address("10.78.0.2/24", "e1")
    up = nodes.up(net.host("ada", left, "10.77.0.1/24"), middle, net.host("cleo", right, "10.78.0.3/24"), code=CODE)
    until(lambda: up[1].visible() == set(NAMES) and len(up[0].visible()) == len(up[2].visible()) == 2, 10)
    time.sleep(3)
    assert [sorted(node.visible()) for node in up] == [["ada", "bob"], ["ada", "bob", "cleo"], ["bob", "cleo"]]


@pytest.mark.net
def test_a_peer_that_is_not_there_is_told(net: Lab, nodes: Nodes) -> None:
    (up,) = nodes.up(net.host("ada", net.switch(), "10.77.0.1/24"), code=CODE, peers=("10.77.0.7",))
    until(lambda: any("10.77.0.7" in each for each in up.notices()), 15, up.notices)
