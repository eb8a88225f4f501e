"""Looks at everything, one thing after the other, and hands it to those who judge. Nothing is changed."""

import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import anyio
from msgspec import Struct

from covey.checkpoints import catalogue
from covey.cli.client import DEFAULT_PORT, CliError, NodeAwayError, NodeClient, address
from covey.cli.doctor import cluster, machine, network
from covey.cli.doctor.finding import Finding, problem, warning
from covey.control import join_code
from covey.control.join_code import JoinCode, JoinCodeError
from covey.desktop.managers import manager
from covey.desktop.service import ServiceError
from covey.effects import interfaces, multicast_trial, paths, peer_check, surroundings, trust
from covey.effects.addresses import is_local, local_host
from covey.effects.beacon import PERIOD_S
from covey.effects.code_file import CODE_FILE
from covey.effects.endpoints import AddressError, mesh_port, peer_address
from covey.effects.http_server import ListenError, listen
from covey.effects.interfaces import Place, is_loopback
from covey.effects.membership import CLUSTER_VARIABLE
from covey.effects.multicast_trial import Groups
from covey.effects.neighbours import cluster_name
from covey.effects.probe import Probe
from covey.schema.cluster import ClusterState

ANSWER_S_MAX: Final = 10.0
ANY_PORT: Final = 0
LISTEN_S: Final = PERIOD_S + 0.5  # so that each node sends at least one beacon
SCOUTING_S_MAX: Final = 2.0


class Asked(Struct, frozen=True, kw_only=True):
    """But for `url` as `covey up` takes them."""

    url: str
    host: str = ""  # where a node of this machine would listen; empty: at the `url`
    data_dir: Path | None = None
    peers: tuple[str, ...] = ()
    interfaces: tuple[str, ...] = ()
    anyone_joins: bool = False


def url_of(host: str, port: int) -> str:
    """Where this machine reaches the node that was started with these."""
    reached = local_host(host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def findings(asked: Asked) -> list[Finding]:
    """Takes some seconds. Raises `CliError` where what was asked makes no sense."""
    url = address(asked.url)
    state, failure = _ask(url)
    code = trust.OPEN_CODE if asked.anyone_joins else _code()
    network_findings, heard = _network(asked, urlsplit(url).port or DEFAULT_PORT, code)
    return [
        cluster.node(url, state, failure),
        *_ports(asked.host, url, state),
        *network_findings,
        *(cluster.cluster(state, metadata.version("covey"), sys.platform, heard) if state else ()),
        *_peers(asked.peers, code),
        *_machine(asked, cluster.starts(state) if state else []),
    ]


def _ask(url: str) -> tuple[ClusterState | None, str]:
    """What the node says; or else why it does not, if there is anybody."""
    try:
        with NodeClient(url, ANSWER_S_MAX) as node:
            return node.cluster(), ""
    except NodeAwayError:
        return None, ""
    except CliError as error:
        return None, str(error)


def _ports(chosen: str, url: str, state: ClusterState | None) -> Iterator[Finding]:
    """Whether a node could have its ports, on this machine, where none has. `chosen`: the host, if one was."""
    parsed = urlsplit(url)
    host, number = chosen or parsed.hostname or "", parsed.port or DEFAULT_PORT
    if state is not None or not (chosen or is_local(host)):
        return
    if not _is_free(host, ANY_PORT):
        yield network.foreign_host(host)
    else:
        yield network.port(number, is_free=_is_free(host, number), holder=surroundings.listener_at(number))
        mesh = mesh_port(number)
        holder = surroundings.listener_at(mesh)  # perhaps at another address of this machine
        yield network.mesh_port(mesh, is_free=not holder and _is_free(host, mesh), holder=holder)


def _is_free(host: str, number: int) -> bool:
    try:
        listen(host, number).close()
    except ListenError:
        return False
    return True


def _network(asked: Asked, port: int, code: JoinCode | None) -> tuple[list[Finding], set[str]]:
    """Also the names of the clusters that are heard."""
    places = interfaces.usable(interfaces.all_places(), asked.interfaces)
    abroad = [place for place in places if not is_loopback(place[1]) or set(place) & set(asked.interfaces)]
    groups, name = multicast_trial.beacon_groups(), os.environ.get(CLUSTER_VARIABLE, "")
    trial = multicast_trial.attempt(abroad, groups, LISTEN_S)
    own = trust.cluster_id_of(code, name) if code else ""
    findings = [
        network.addresses(places),
        network.multicast("multicast", trial, groups, sys.platform),
        *([_scouting(places, code, name)] if code else ()),
        network.clusters(trial.heard, own, trust.cluster_id_of(trust.OPEN_CODE, name)),
        network.versions(trial.heard),
        network.firewall(surroundings.firewall(), mesh_port(port), groups),
        network.container(is_container=surroundings.is_container()),
    ]
    return findings, {cluster_name(beacon.cluster) for beacon, _ in trial.heard}


def _scouting(places: Sequence[Place], code: JoinCode, name: str) -> Finding:
    """Where nodes of this cluster look for one another."""
    group, number = trust.scouting_of(code, name)
    groups = Groups(group, "", number)
    trial = multicast_trial.attempt(places, groups, SCOUTING_S_MAX, until_back=True)
    return network.multicast("discovery", trial, groups, sys.platform)


def _machine(asked: Asked, starts: Sequence[tuple[str, int]]) -> Iterator[Finding]:
    yield machine.clock(time.time(), starts)
    yield from _folders(asked.data_dir)
    if not asked.anyone_joins:
        yield _code_file()
    yield from _service()
    yield machine.memory(Probe(paths.models_folder()).hardware(), catalogue.listed())
    yield machine.open_files(surroundings.open_files_max())
    yield machine.accelerator(surroundings.gpu(), surroundings.engine_failure())


def _service() -> Iterator[Finding]:
    """None where no service is installed, or there is nobody who could keep one."""
    with suppress(ServiceError):
        found = manager().status()
        if found.is_installed:
            yield machine.service(found)


def _folders(data_dir: Path | None) -> Iterator[Finding]:
    """Folders on one disk share its space, and those that are not there yet the one above."""
    seen: set[Path | int] = set()
    for what, wanted in (("this node's data", paths.node_folder(data_dir)), ("models", paths.models_folder())):
        try:
            found = surroundings.folder(wanted)
        except OSError as error:
            yield problem("folder", f"{wanted} can't be looked at: {error.strerror or error}.", "Choose another one.")
            continue
        if found.path not in seen:
            yield machine.folder(wanted, found, os.getuid())
        if found.device not in seen:
            yield machine.disk(what, found)
        seen |= {found.path, found.device}


def _code_file() -> Finding:
    path = paths.home() / CODE_FILE
    try:
        return machine.code_file(path, path.read_text(errors="replace"), path.stat().st_mode)
    except FileNotFoundError:
        return machine.code_file(path, None, 0)
    except OSError as error:
        return problem("join code", f"{path} can't be read ({error.strerror or error}).", "Run Covey as its owner.")


def _code() -> JoinCode | None:
    """If there is one that can be read; `_code_file` says what is wrong with it."""
    try:
        return join_code.parse((paths.home() / CODE_FILE).read_text(errors="replace"))
    except (OSError, JoinCodeError):
        return None


def _peers(peers: Sequence[str], code: JoinCode | None) -> list[Finding]:
    if peers and code is None:
        advice = "Start `covey up` once, or `covey up --join CODE` if it is to join theirs."
        return [warning("peer", "This machine has no join code, so no peer can be known as its own.", advice)]
    return network.peers({peer: _about(peer, code) for peer in peers if code}) if code else []


def _about(peer: str, code: JoinCode) -> str:
    """What is wrong with it, if anything. Whoever is far away is not asked."""
    try:
        host, number = peer_address(peer)
        found = {
            str(each[4][0]).partition("%")[0] for each in socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)
        }
    except AddressError as error:
        return str(error)
    except OSError as error:
        return f"the peer {peer} is not found: {error.strerror or error}"
    if not all(interfaces.is_near(each) for each in found):
        return f"the peer {peer} is not in a network of this machine, so it is not asked"
    authority = trust.authority_of(code, os.environ.get(CLUSTER_VARIABLE, ""))
    return " ".join(anyio.run(peer_check.examine, [(host, number)], authority))
