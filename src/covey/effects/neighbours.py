"""What the beacons of others mean: sentences for a person, and addresses of our own cluster that discovery missed."""

from typing import Final, TypeVar

from msgspec import Struct

from covey.effects.endpoints import endpoint
from covey.schema.mesh import MESH_PROTOCOL, Beacon, BeaconHeard

FORGOTTEN_S: Final = 15.0  # three beacons and some
OTHERS_MAX: Final = 8  # clusters, and versions: more sentences help nobody
# Zenoh scouts over IPv4 alone, at most 8 s apart; what it does not find we name to it. Of two that find each other so
# the one that sees fewer nodes dials, since that interrupts it shortly; the other one waits longer.
DIAL_AFTER_S: Final = {4: 9.0, 6: 1.0}
DIAL_PATIENCE_S: Final = 6.0
MISSED_MAX: Final = 64

_FIRST: Final = (
    "amber brave calm clear copper coral crisp dapper deep early fair fleet gentle glad golden grand green happy "
    "hazel honest ivory jolly keen kind light lively lucky mellow merry mild misty neat noble olive pearl plain proud "
    "quick quiet rapid ready red rosy ruby rustic sandy shy silent silver sleek smart snowy solid spry steady sunny "
    "swift tidy true velvet warm wild wise young"
)
_SECOND: Final = (
    "acorn badger beaver birch bison brook canyon cedar clover comet crane cricket dune eagle elm ember falcon fern "
    "finch forest fox garden glacier grove harbor hare heron hill island ivy lake lark lynx maple marten meadow moon "
    "moose oak orchid otter owl panda pebble pine plover pond poplar raven reef river robin sparrow spruce stone "
    "stork swan thistle tiger trout walnut willow wolf wren"
)


def cluster_name(cluster_id: str) -> str:
    """Two words that people can tell clusters apart by; derived, so that nobody's text is shown."""
    number, first, second = int(cluster_id, 16), _FIRST.split(), _SECOND.split()
    return f"{first[number % len(first)]}-{second[number // len(first) % len(second)]}"


_Key = TypeVar("_Key")


class _Stranger(Struct):
    node_count: int
    heard_s: float


class _Missed(Struct):
    since_s: float
    heard_s: float
    is_ours_to_dial: bool


class Neighbours:
    """Pure but for its memory: the caller says what time it is, in seconds of any clock."""

    def __init__(self, cluster_id: str) -> None:
        self._cluster_id = cluster_id
        self._clusters: dict[str, _Stranger] = {}
        self._versions: dict[tuple[int, str], _Stranger] = {}  # (protocol, address)
        self._missed: dict[tuple[str, str], _Missed] = {}  # (sender, endpoint)

    def hear(self, now_s: float, heard: BeaconHeard) -> None:
        beacon = heard.beacon
        if beacon.protocol != MESH_PROTOCOL:
            _note(self._versions, (beacon.protocol, heard.address), now_s, beacon)
        elif beacon.cluster != self._cluster_id:
            _note(self._clusters, beacon.cluster, now_s, beacon)
        else:
            self._hear_own(now_s, heard)

    def _hear_own(self, now_s: float, heard: BeaconHeard) -> None:
        key = (heard.beacon.sender, endpoint(heard.address, heard.beacon.port))
        if heard.is_linked:
            for known in [each for each in self._missed if each[0] == heard.beacon.sender]:
                del self._missed[known]
        elif key in self._missed:
            self._missed[key].heard_s = now_s
        elif len(self._missed) < MISSED_MAX:
            self._missed[key] = _Missed(now_s, now_s, heard.is_ours_to_dial)

    def dials(self, now_s: float) -> list[str]:
        """Endpoints of our own cluster whose beacons we have heard for long enough without a connection."""
        self._forget(now_s)
        with_4 = {sender for sender, where in self._missed if not _is_version_6(where)}
        return sorted(
            where
            for (sender, where), missed in self._missed.items()
            if now_s - missed.since_s
            >= DIAL_AFTER_S[4 if sender in with_4 else 6] + DIAL_PATIENCE_S * (not missed.is_ours_to_dial)
        )

    def notices(self, now_s: float) -> list[str]:
        """One sentence for each other cluster and other version."""
        self._forget(now_s)
        others = [
            f"another cluster of Covey is here: {cluster_name(cluster)} ({_nodes(stranger.node_count)}). To join: "
            "covey up --join CODE, with the code that `covey join-code` shows on one of its devices"
            for cluster, stranger in sorted(self._clusters.items())
        ]
        versions = [
            f"Covey at {address} {_age(protocol)}, and the two can't work together; update the older one"
            for protocol, address in sorted(self._versions)
        ]
        return others + versions

    def _forget(self, now_s: float) -> None:
        oldest_s = now_s - FORGOTTEN_S
        self._clusters = {key: each for key, each in self._clusters.items() if each.heard_s >= oldest_s}
        self._versions = {key: each for key, each in self._versions.items() if each.heard_s >= oldest_s}
        self._missed = {key: each for key, each in self._missed.items() if each.heard_s >= oldest_s}


def _note(known: dict[_Key, _Stranger], key: _Key, now_s: float, beacon: Beacon) -> None:
    if key in known or len(known) < OTHERS_MAX:
        known[key] = _Stranger(beacon.node_count, now_s)


def _is_version_6(where: str) -> bool:
    return where.count(":") > 1


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _age(protocol: int) -> str:
    return "is an older version" if protocol < MESH_PROTOCOL else "is a newer version"
