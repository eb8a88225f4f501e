"""What is seen, and what is made of it: causes that no test can bring about on every machine."""

from pathlib import Path

import msgspec
import pytest

from covey.checkpoints import catalogue
from covey.cli.doctor import cluster, machine, network
from covey.cli.doctor.finding import Finding, Level, ok, problem, summary, warning
from covey.cli.doctor.showing import has_problems, listing, report
from covey.desktop.service import ServiceStatus
from covey.effects.multicast_trial import Groups, Trial
from covey.effects.surroundings import Folder
from covey.schema.cluster import ClusterState, Visibility, Wish
from covey.schema.mesh import MESH_PROTOCOL, Beacon
from covey.schema.runner import RunnerState
from tests.api.fake_backend import CARD, FakeBackend, hardware
from tests.api.fake_backend import cluster as failed
from tests.credentials import CODE

NAMES = ("attic", "anna", "berta")  # as people wrote them
NOW_S = 1_795_000_000.0
GROUPS = Groups("239.255.67.79", "ff12::434f", 19415)
LAN, WIFI = ("eth0", "10.0.0.2"), ("wlan0", "fd00::2")
FOLDER = Folder(
    path=Path("/data/node"),
    is_folder=True,
    is_writable=True,
    owner=1000,
    mode=0o700,
    is_in_reach=True,
    device=1,
    bytes_free=10**11,
    files_free=None,
)
BEACON = Beacon(protocol=MESH_PROTOCOL, cluster="0123456789abcdef", sender="ab" * 16, port=53415, node_count=2, link=0)


def told(finding: Finding) -> tuple[Level, str]:
    assert bool(finding.advice) == (finding.level is not Level.OK), "who is told of trouble is told what to do"
    for sentence in filter(None, (finding.seen, finding.advice)):
        assert sentence.endswith((".", "?")), sentence
        assert sentence[0].upper() == sentence[0] or sentence.startswith(NAMES), sentence
    return finding.level, finding.seen


def test_a_model_that_failed_is_told_of_without_its_log() -> None:
    log = "Traceback (most recent call last):\nlast"
    state = failed(RunnerState.READY, RunnerState.FAILED, reason=f"the runner ended: exit status 3\n{log}")
    [found] = cluster.cluster(state, "0.1.0", "linux", ())
    assert told(found) == (Level.PROBLEM, "Tiny-Chat failed: the runner ended: exit status 3.")
    assert found.advice == "`covey place Tiny-Chat` tries again, and `covey stop Tiny-Chat` gives up on it."


def changed(state: ClusterState, number: int, **fields: object) -> ClusterState:
    """The cluster with other fields of this member."""
    members = list(state.members)
    members[number] = msgspec.structs.replace(members[number], **fields)
    return msgspec.structs.replace(state, members=tuple(members))


def waiting(reason: str) -> ClusterState:
    """The second runner can't start, for this reason."""
    state = failed(RunnerState.READY, RunnerState.IDLE)
    report = state.members[1].report
    assert report is not None
    [runner] = report.runners
    held_up = msgspec.structs.replace(runner, waiting=reason)
    return changed(state, 1, report=msgspec.structs.replace(report, runners=(held_up,)))


def test_a_model_that_waits_for_memory_is_told_of() -> None:
    [found] = cluster.cluster(waiting("has too little memory now: 1 GB"), "0.1.0", "linux", ())
    assert told(found) == (Level.WARNING, "Tiny-Chat is not ready: berta has too little memory now: 1 GB.")
    assert found.advice.startswith("Free memory there")


def test_a_model_that_merely_starts_is_no_trouble() -> None:
    [found] = cluster.cluster(failed(RunnerState.READY, RunnerState.IDLE), "0.1.0", "linux", ())
    assert told(found) == (Level.OK, "The node has nothing to complain of.")


def test_a_model_without_room_for_the_share_of_a_node_that_is_gone_is_told_of() -> None:
    state = changed(failed(RunnerState.READY, RunnerState.READY), 1, visibility=Visibility.AWAY, heard_ms_ago=60_000)
    report = state.members[0].report
    assert report is not None
    small = msgspec.structs.replace(hardware("anna"), memory_bytes_total=10**6, memory_bytes_available=10**5)
    state = changed(state, 0, report=msgspec.structs.replace(report, hardware=small))
    wish = Wish(wish_id=state.instances[0].wish_id, card=CARD, node_count_min=2, context_length=1024, slot_count=2)
    lacking = msgspec.structs.replace(state, wishes=(wish,))
    away, found = cluster.cluster(lacking, "0.1.0", "linux", ())
    assert told(away)[1].startswith("berta has not been heard")
    level, seen = told(found)
    assert level is Level.WARNING
    assert seen.startswith("Tiny-Chat is not ready: waiting for berta, without which it finds no room: ")
    [_, without] = cluster.cluster(msgspec.structs.replace(lacking, instances=()), "0.1.0", "linux", ())
    assert told(without)[1].startswith("Tiny-Chat waits for a place: ")
    assert not without.seen.endswith("..")


@pytest.mark.parametrize(
    ("now_s", "starts", "level", "part"),
    [
        (0.0, [], Level.PROBLEM, "shows 1970-01-01 00:00 UTC, before Covey"),
        (NOW_S, [], Level.OK, "2026-11-18"),
        (NOW_S, [("attic", int(NOW_S) - 9)], Level.OK, "fits what the other nodes say"),
        (NOW_S, [("attic", 7)], Level.WARNING, "The clock of attic showed 1970-01-01"),
        (NOW_S, [("attic", int(NOW_S) + 9000)], Level.WARNING, "attic was started at"),
    ],
)
def test_the_clock(now_s: float, starts: list[tuple[str, int]], level: Level, part: str) -> None:
    found = told(machine.clock(now_s, starts))
    assert found[0] is level
    assert part in found[1]


@pytest.mark.parametrize(
    ("change", "level"),
    [
        ({}, Level.OK),
        ({"bytes_free": 10**9}, Level.WARNING),
        ({"bytes_free": 4096}, Level.PROBLEM),
        ({"files_free": 3}, Level.PROBLEM),
    ],
)
def test_the_disk(change: dict[str, int], level: Level) -> None:
    assert told(machine.disk("models", msgspec.structs.replace(FOLDER, **change)))[0] is level


@pytest.mark.parametrize(
    ("change", "level"),
    [
        ({}, Level.OK),
        ({"path": Path("/data")}, Level.OK),
        ({"path": Path("/data"), "is_folder": False}, Level.PROBLEM),
        ({"path": Path("/data"), "is_writable": False}, Level.PROBLEM),
        ({"is_writable": False}, Level.PROBLEM),
        ({"owner": 0}, Level.WARNING),
        ({"mode": 0o755}, Level.WARNING),
        ({"mode": 0o777}, Level.PROBLEM),
        ({"mode": 0o777, "is_in_reach": False}, Level.OK),
    ],
)
def test_the_folder(change: dict[str, object], level: Level) -> None:
    assert told(machine.folder(FOLDER.path, msgspec.structs.replace(FOLDER, **change), 1000))[0] is level


@pytest.mark.parametrize(
    ("content", "mode", "level"),
    [
        (None, 0, Level.OK),
        (CODE.text(), 0o600, Level.OK),
        (CODE.text(), 0o644, Level.PROBLEM),
        ("?", 0o600, Level.PROBLEM),
    ],
)
def test_the_join_code(content: str | None, mode: int, level: Level) -> None:
    found = machine.code_file(Path("/data/join-code"), content, mode)
    assert told(found)[0] is level
    assert CODE.text() not in found.seen + found.advice


@pytest.mark.parametrize(("free", "level"), [(10**7, Level.PROBLEM), (250_000_000, Level.WARNING), (10**10, Level.OK)])
def test_the_memory(free: int, level: Level) -> None:
    seen = msgspec.structs.replace(hardware("a"), memory_bytes_available=free, memory_bytes_total=10**10)
    assert told(machine.memory(seen, catalogue.listed()))[0] is level


def test_libraries_and_limits() -> None:
    assert told(machine.accelerator("", ""))[0] is Level.OK
    assert told(machine.accelerator("an NVIDIA GPU", ""))[0] is Level.WARNING
    assert told(machine.accelerator("an NVIDIA GPU", "ImportError: libgomp.so.1"))[0] is Level.PROBLEM
    assert [told(machine.open_files(limit))[0] for limit in (128, 256, 1024)] == list(reversed(Level))


def test_the_service() -> None:
    runs = ServiceStatus(
        manager="systemd",
        file="/f",
        is_installed=True,
        is_running=True,
        state="active (running)",
        log_command="tail /l",
    )
    ends = msgspec.structs.replace(runs, is_running=False, state="failed (failed)")
    assert told(machine.service(runs))[0] is Level.OK
    assert told(machine.service(ends)) == (
        Level.WARNING,
        "The service is installed and does not run: failed (failed).",
    )
    assert told(machine.service(msgspec.structs.replace(runs, restarts=9)))[0] is Level.WARNING


@pytest.mark.parametrize(
    ("lost", "platform", "level", "advice"),
    [
        ({}, "linux", Level.OK, ""),
        ({LAN: ""}, "linux", Level.WARNING, "Let UDP port 19415 through the firewall"),
        ({LAN: "", WIFI: "Network is down"}, "linux", Level.PROBLEM, "--peer ADDRESS"),
        ({LAN: "No route to host", WIFI: ""}, "darwin", Level.PROBLEM, "System Settings, Privacy & Security, Local"),
    ],
)
def test_multicast(lost: dict[tuple[str, str], str], platform: str, level: Level, advice: str) -> None:
    found = network.multicast("multicast", Trial((LAN, WIFI), lost), GROUPS, platform)
    assert told(found)[0] is level
    assert advice in found.advice
    assert "macOS" in found.seen or platform != "darwin"


def test_nothing_to_try_is_no_failure() -> None:
    assert told(network.multicast("multicast", Trial((), {}), GROUPS, "linux"))[0] is Level.OK
    assert told(network.addresses([("lo", "127.0.0.1")]))[0] is Level.WARNING
    assert told(network.addresses([LAN])) == (
        Level.OK,
        "Other nodes are met at 10.0.0.2 (eth0); there is no private IPv6 address.",
    )


def test_who_else_is_there() -> None:
    own, other = BEACON.cluster, msgspec.structs.replace(BEACON, cluster="f" * 16, sender="cd")
    assert told(network.clusters([], own, ""))[0] is Level.OK
    assert told(network.clusters([(BEACON, "10.0.0.3")], own, "")) == (
        Level.OK,
        "No other cluster is heard, and 1 node of this one.",
    )
    found = network.clusters([(BEACON, "10.0.0.3"), (other, "10.0.0.4")], own, "")
    assert told(found)[0] is Level.WARNING
    assert "(2 nodes)" in found.seen
    assert "the open one" in network.clusters([(other, "10.0.0.4")], own, other.cluster).seen


def test_other_versions() -> None:
    strange = [(msgspec.structs.replace(BEACON, protocol=MESH_PROTOCOL + 1), "10.0.0.3")]
    assert told(network.versions([(BEACON, "10.0.0.3")]))[0] is Level.OK
    assert told(network.versions(strange)) == (
        Level.PROBLEM,
        "Covey is in another version at 10.0.0.3 (newer), and cannot work with this one.",
    )
    assert told(network.clusters(strange, "", ""))[0] is Level.OK, "what it means by a cluster is not known"


def test_ports_walls_and_containers() -> None:
    assert told(network.port(1, is_free=False, holder="nginx (process 7)")) == (
        Level.PROBLEM,
        "Port 1 is in use by nginx (process 7), and a node can't have it for its API.",
    )
    assert "does not show itself" in network.port(1, is_free=False, holder="").seen
    assert told(network.mesh_port(2, is_free=False, holder=""))[0] is Level.WARNING
    assert told(network.firewall("ufw", 53415, GROUPS))[0] is Level.WARNING
    assert told(network.firewall("", 53415, GROUPS))[0] is Level.OK
    assert [told(network.container(is_container=each))[0] for each in (True, False)] == [Level.WARNING, Level.OK]


def test_what_a_node_says() -> None:
    backend = FakeBackend()
    state = backend.state()
    assert told(cluster.node("http://a", state, ""))[0] is Level.OK
    assert told(cluster.node("http://a", None, ""))[0] is Level.OK
    assert told(cluster.node("http://a", None, "The node at http://a broke off: timed out."))[0] is Level.PROBLEM
    versions = [each for each in cluster.cluster(state, "9.9", "linux", ()) if each.check == "versions"]
    assert versions
    assert {told(each)[0] for each in versions} == {Level.WARNING}
    noticed = msgspec.structs.replace(
        state,
        notices=("another cluster of Covey is here: mild-fern (1 node)", "multicast does not work on en0"),
        members=(
            msgspec.structs.replace(state.members[0], visibility=Visibility.AWAY, heard_ms_ago=4000),
            *state.members[1:],
        ),
    )
    found = cluster.cluster(noticed, "9.9", "darwin", {"mild-fern"})
    assert [each.check for each in found if each.check in {"network", "nodes"}] == ["network", "nodes"]
    assert "Local Network" in next(each.advice for each in found if each.check == "network")
    assert all(told(each) for each in found)


def test_what_is_shown() -> None:
    findings = [ok("clock", "It is."), warning("disk", "Little.", "Delete."), problem("port", "Used.", "End it.")]
    assert summary(findings) == "1 problem: port. 1 warning: disk."
    assert summary(findings[:1]) == "Nothing is wrong, as far as can be seen from here."
    assert listing(findings).rows[1] == ("disk", "warning", "Little.\nDelete.")
    assert report(findings)["checks"][2] == {
        "check": "port",
        "level": Level.PROBLEM,
        "seen": "Used.",
        "advice": "End it.",
    }
    assert [has_problems(findings), has_problems(findings[:2])] == [True, False]
