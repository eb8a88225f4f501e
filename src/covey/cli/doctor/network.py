"""Judges what is seen of the network: addresses, ports, multicast, and who else is there."""

from collections.abc import Mapping, Sequence
from typing import Final

from covey.cli.doctor.finding import Finding, ok, problem, warning
from covey.effects.interfaces import Place, is_loopback
from covey.effects.multicast_trial import Groups, Trial
from covey.effects.neighbours import cluster_name
from covey.schema.mesh import MESH_PROTOCOL, Beacon

MAC: Final = "darwin"
SHOWN_MAX: Final = 8


def addresses(places: Sequence[Place]) -> Finding:
    """`places`: where other nodes are met."""
    others = [f"{address} ({interface})" for interface, address in places if not is_loopback(address)]
    if not others:
        seen = "No private address is here, so this machine meets only nodes on itself."
        return warning("addresses", seen, "Connect it to a network, or choose an address with --interface.")
    families = {":" in address for _, address in places if not is_loopback(address)}
    only = "" if len(families) > 1 else f"; there is no private IPv{'4' if families == {True} else '6'} address"
    return ok("addresses", f"Other nodes are met at {', '.join(others[:SHOWN_MAX])}{only}.")


def port(number: int, *, is_free: bool, holder: str) -> Finding:
    """Of the API, where no node answers."""
    if is_free:
        return ok("port", f"Port {number} is free for the API.")
    who = holder or "another program, which does not show itself to you"
    advice = f"End it, or start the node at another port: `covey up --port {number + 1}`."
    return problem("port", f"Port {number} is in use by {who}, and a node can't have it for its API.", advice)


def foreign_host(host: str) -> Finding:
    """A node can't listen there."""
    return problem(
        "port", f"{host} is no address of this machine.", "Name one that is with --host, or 0.0.0.0 for all."
    )


def mesh_port(number: int, *, is_free: bool, holder: str) -> Finding:
    """Where other nodes connect to this one."""
    if is_free:
        return ok("mesh port", f"Port {number} is free for other nodes.")
    seen = f"Port {number}, where other nodes would connect, is in use by {holder or 'another program'}."
    return warning("mesh port", seen, "A node takes another one then; `--peer` can't name it. End that program.")


def multicast(check: str, trial: Trial, groups: Groups, platform: str) -> Finding:
    """`platform` as Python names it: on a Mac the cause is another one."""
    if not trial.tried:
        return ok(check, "There is no network to try it on.")
    if not trial.lost:
        return ok(check, f"What is sent to all comes back ({_places(trial.tried)}; UDP port {groups.port}).")
    strength = problem if len(trial.lost) == len(trial.tried) else warning
    why = ", ".join(dict.fromkeys(reason for reason in trial.lost.values() if reason)) or "it does not come back"
    seen = f"Multicast does not work on {_places(list(trial.lost))}: {why}."
    if platform == MAC:
        return strength(check, f"{seen} This is how macOS keeps programs from the local network.", MAC_ADVICE)
    advice = (
        f"Let UDP port {groups.port} through the firewall, end a program that holds it alone, or name the other nodes "
        "with `covey up --peer ADDRESS`."
    )
    return strength(check, seen, advice)


MAC_ADVICE: Final = (
    "Allow it in System Settings, Privacy & Security, Local Network; if Covey is not listed there, `covey launcher` "
    "makes an app that macOS asks about."
)


def _places(places: Sequence[Place]) -> str:
    return ", ".join(
        dict.fromkeys(f"{interface} {'IPv6' if ':' in address else 'IPv4'}" for interface, address in places)
    )


def clusters(heard: Sequence[tuple[Beacon, str]], own_cluster: str, open_cluster: str) -> Finding:
    """`own_cluster`: empty where this machine has no join code yet."""
    understood = [beacon for beacon, _ in heard if beacon.protocol == MESH_PROTOCOL]
    own = {beacon.sender for beacon in understood if beacon.cluster == own_cluster}
    others: Mapping[str, int] = {
        beacon.cluster: beacon.node_count for beacon in understood if beacon.cluster != own_cluster
    }
    if not others:
        return ok("clusters", f"No other cluster is heard{f', and {_nodes(len(own))} of this one' if own else ''}.")
    names = [
        f"{'the open one' if cluster == open_cluster else cluster_name(cluster)} ({_nodes(count)})"
        for cluster, count in sorted(others.items())[:SHOWN_MAX]
    ]
    seen = f"Another cluster of Covey is on this network: {', '.join(names)}."
    advice = "If this device should be in it: `covey up --join CODE`, with what `covey join-code` shows there."
    return warning("clusters", seen, advice)


def versions(heard: Sequence[tuple[Beacon, str]]) -> Finding:
    strange = {address: beacon.protocol for beacon, address in heard if beacon.protocol != MESH_PROTOCOL}
    if not strange:
        return ok("versions", "No node of a version that does not fit is heard.")
    told = [
        f"{address} ({'older' if protocol < MESH_PROTOCOL else 'newer'})"
        for address, protocol in sorted(strange.items())[:SHOWN_MAX]
    ]
    seen = f"Covey is in another version at {', '.join(told)}, and cannot work with this one."
    return problem("versions", seen, "Update the older one.")


def peers(sentences: Mapping[str, str]) -> list[Finding]:
    """`sentences`: for each peer that was named what is wrong with it, or nothing."""
    advice = "`covey doctor` on that device shows its side; docs/network.md says what nodes need of a network."
    return [
        problem("peer", f"{sentence[:1].upper()}{sentence[1:]}{'' if sentence.endswith('?') else '.'}", advice)
        if sentence
        else ok("peer", f"{peer} answers, and is of this cluster.")
        for peer, sentence in sentences.items()
    ]


def firewall(name: str, mesh: int, groups: Groups) -> Finding:
    if not name:
        return ok("firewall", "None that is switched on is seen.")
    advice = (
        f"If other devices don't see this one, allow TCP port {mesh}, UDP port {groups.port} and the ports of runners "
        f"there: docs/network.md lists them."
    )
    return warning("firewall", f"A firewall is switched on: {name}. What it lets through can't be seen.", advice)


def container(*, is_container: bool) -> Finding:
    if not is_container:
        return ok("container", "This is none.")
    seen = "This is a container: multicast of other machines does not reach it unless it uses the host's network."
    return warning("container", seen, "Start it with `--network host`, or name another node with `--peer ADDRESS`.")


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"
