"""Who else is on the network: other clusters, other versions, and somebody who listens and tries doors."""

import secrets
import socket
import ssl
import subprocess
import time

import pytest
from lab import Host, Lab, inside
from tiny_model import write_model
from up import Node, Nodes, together, until

from covey.control.join_code import JoinCode
from covey.effects import beacon
from covey.effects.neighbours import cluster_name
from covey.effects.trust import make_credentials
from covey.schema.mesh import MESH_PROTOCOL, Beacon

CODE, OTHER_CODE = JoinCode(bytes(16)), JoinCode(bytes(range(16)))
MESH_PORT = 53415
SECRET_NAME, SECRET_PROMPT = "ada-of-the-secret-garden", "tell nobody about the treasure"


def say(host: Host, made: Beacon) -> None:
    with inside(host.namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("10.77.0.66"))
        sender.sendto(beacon.pack(made), (beacon.GROUP_4, beacon.PORT))


def forged(**fields: object) -> Beacon:
    values = {"cluster": "0" * 16, "sender": secrets.token_hex(16), "port": 4, "node_count": 1, "link": 0}
    return Beacon(**{"protocol": MESH_PROTOCOL, **values, **fields})  # pyright: ignore[reportArgumentType]


def test_two_clusters_on_one_network_know_of_each_other_and_keep_apart(net: Lab, nodes: Nodes) -> None:
    lan = net.switch()
    hosts = [net.host(name, lan, f"10.77.0.{number}/24") for number, name in enumerate(("ada", "bob", "eve"), 1)]
    ours = nodes.up(*hosts[:2], code=CODE.text())
    together(ours)
    (other,) = nodes.up(hosts[2], code=OTHER_CODE.text())
    told_s = until(lambda: other.notices() and ours[0].notices() and ours[1].notices(), 5)
    print(f"told after {told_s:.1f} s")
    sentence = until_counted(other)
    assert sentence.startswith("another cluster of Covey is here: ")
    assert sentence.endswith(
        "(2 nodes). To join: covey up --join CODE, with the code that `covey join-code` shows on one of its devices"
    )
    assert sentence in other.errors()
    assert "(1 node)" in ours[0].notices()[0]
    time.sleep(3)
    assert [sorted(node.visible()) for node in (*ours, other)] == [["ada", "bob"], ["ada", "bob"], ["eve"]]
    assert set(nodes_named(ours[0]) + nodes_named(other)) == {"ada", "bob", "eve"}


def until_counted(node: Node) -> str:
    """The sentence, once the other cluster has counted itself."""
    until(lambda: "(2 nodes)" in node.notices()[0], 10, node.notices)
    return node.notices()[0]


def nodes_named(node: Node) -> list[str]:
    return [each["report"]["name"] for each in node.get("/cluster")["members"] if each["report"]]


def test_another_version_has_its_own_sentence(net: Lab, nodes: Nodes) -> None:
    lan = net.switch()
    (up,) = nodes.up(net.host("ada", lan, "10.77.0.1/24"), code=CODE.text())
    old = net.host("old", lan, "10.77.0.66/24")
    until(lambda: say(old, forged(protocol=MESH_PROTOCOL + 1)) or up.notices(), 5)
    assert up.notices() == [
        "Covey at 10.77.0.66 is a newer version, and the two can't work together; update the older one"
    ]


def test_a_stranger_reads_nothing_and_gets_nowhere(net: Lab, nodes: Nodes) -> None:
    lan = net.switch()
    lan.frames = []
    hosts = [net.host(name, lan, f"10.77.0.{number}/24") for number, name in enumerate((SECRET_NAME[:20], "bob"), 1)]
    stranger = net.host("stranger", lan, "10.77.0.66/24")
    up = nodes.up(*hosts, code=CODE.text())
    together(up)
    model = write_model(net.home / "model.gguf", layers=4)
    up[0].post("/place_instance", {"model_id": str(model), "min_nodes": 2})
    until(lambda: up[0].runner_states() == up[1].runner_states() == ["Ready"] * 2, 30)
    for node in up:  # one of them asks the other's runner, and each runner the other
        body = {"model": str(model), "messages": [{"role": "user", "content": SECRET_PROMPT}], "max_tokens": 5}
        node.post("/v1/chat/completions", body)
    for host, address in zip(hosts, ("10.77.0.1", "10.77.0.2"), strict=True):
        ports = doors(host)
        assert MESH_PORT in ports
        assert len(ports) == 2
        assert_closed(stranger, address, ports)
    pids = {node.process.pid for node in up}
    forge_for_a_while(stranger, up)
    wire = b"".join(lan.frames)
    assert len(wire) > 50_000
    assert up[0].name.encode() not in wire
    assert SECRET_PROMPT.encode() not in wire
    assert b"model.gguf" not in wire
    assert all(node.node_id.encode() not in wire for node in up)
    assert all(len(node.visible()) == 2 and node.process.pid in pids for node in up)


def doors(host: Host) -> list[int]:
    """TCP ports at which somebody on the network finds the host listening: its mesh, and the runner's links."""
    shown = subprocess.run(host.run("ss", "-ltnH"), capture_output=True, text=True, check=True).stdout
    local = [line.split()[3].rpartition(":") for line in shown.splitlines()]
    return [int(port) for address, _, port in local if address != "127.0.0.1"]


def assert_closed(stranger: Host, address: str, ports: list[int]) -> None:
    """They answer neither clear text, nor TLS without a certificate; the API is not there at all."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with inside(stranger.namespace):
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((address, 52415), 3)
        for port in ports:
            with socket.create_connection((address, port), 3) as connection:
                connection.sendall(b"GET /state HTTP/1.1\r\n\r\n" + bytes(64))
                assert b"HTTP" not in received(connection)
            with socket.create_connection((address, port), 3) as plain, context.wrap_socket(plain) as connection:
                connection.sendall(bytes(64))
                with pytest.raises(ssl.SSLError, match="certificate required"):
                    connection.recv(64)


def received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(4096)
    except OSError:
        return b""


def forge_for_a_while(stranger: Host, up: list[Node]) -> None:
    """Beacons that claim to be of the cluster, floods of them, and rubbish."""
    cluster = next(iter(beacons_cluster(up)))
    for number in range(2000):
        say(stranger, forged(cluster=cluster if number % 2 else secrets.token_hex(8), port=1 + number))
    with inside(stranger.namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("10.77.0.66"))
        for size in range(0, 1400, 7):
            sender.sendto(beacon.BEACON_MAGIC + secrets.token_bytes(size), (beacon.GROUP_4, beacon.PORT))
            sender.sendto(secrets.token_bytes(size), (beacon.GROUP_4, beacon.PORT))
    time.sleep(4)
    assert all(len(node.notices()) <= 16 for node in up)


def beacons_cluster(up: list[Node]) -> set[str]:
    from covey.effects import identity

    with identity.claimed(up[0].home / "elsewhere") as mine:
        return {make_credentials(CODE, mine).cluster_id}


def test_names_of_clusters_are_words() -> None:
    assert cluster_name("0123456789abcdef").replace("-", "").isalpha()
