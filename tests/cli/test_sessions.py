"""What a person reads at the terminal, command by command, as golden text."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from covey.api import event_stream
from covey.api.errors import RequestError
from covey.cli import placing, tables
from covey.cli.client import CliError, NodeClient, address
from covey.cli.listing import Listing
from covey.cli.main import app
from covey.cli.naming import model_to_place, short_ids
from covey.control.activity import Activity
from covey.schema.cluster import (
    Accepted,
    ApiKey,
    ClusterState,
    CommandResult,
    DeleteInstance,
    DownloadReport,
    DownloadState,
    Hardware,
    PlaceModel,
    Refused,
    Visibility,
    Wish,
)
from covey.schema.generation import GenerationFailed
from covey.schema.ids import InstanceId
from covey.schema.model import Quantizing, Shard
from covey.schema.runner import RunnerState
from tests.api.fake_backend import ANSWER, CARD, SECOND, FakeBackend, cluster, hardware
from tests.cli.served_node import ServedNode
from tests.golden import check

GOLDEN = Path(__file__).parent / "golden"
EMPTY = cluster()
LOADING = cluster(RunnerState.READY, RunnerState.LOADING)
FAILED = cluster(
    RunnerState.READY,
    RunnerState.FAILED,
    reason="the runner ended: exit status 3\nTraceback (most recent call last):\nlast",
)


def away() -> Any:
    first, second = cluster(RunnerState.READY, RunnerState.READY).members
    gone = msgspec.structs.replace(second, visibility=Visibility.AWAY, heard_ms_ago=4200)
    return msgspec.structs.replace(LOADING, members=(first, gone))


def alone() -> Any:
    state = cluster(RunnerState.READY, RunnerState.READY)
    return msgspec.structs.replace(state, members=state.members[:1])


def two_instances() -> Any:
    """Placed at one node one after the other: their ids, as long as real ones, begin alike."""
    state = cluster(RunnerState.READY, RunnerState.READY)
    ids = [InstanceId(f"aaaaaaaa-1795259810-{number}.aaaaaaaa-1795259810-0") for number in (1, 2)]
    instances = tuple(msgspec.structs.replace(state.instances[0], instance_id=each) for each in ids)
    return msgspec.structs.replace(state, instances=instances)


def one_node_and_two() -> Any:
    """The second instance was made by `covey place --another --nodes 2`."""
    first, second = two_instances().instances
    alone = msgspec.structs.replace(first, stages=first.stages[:1])
    return msgspec.structs.replace(two_instances(), instances=(alone, second))


def fewer_nodes() -> Any:
    """What was asked for on three nodes is placed on the two that are left."""
    state = cluster(RunnerState.READY, RunnerState.READY)
    wish = Wish(wish_id="wish-1", card=CARD, node_count_min=3, context_length=1024, slot_count=2)
    return msgspec.structs.replace(state, wishes=(wish,))


def shared(rank_count: int, asked_for: int) -> Any:
    """Two nodes, which share each layer if there are two ranks."""
    state = cluster(RunnerState.READY, RunnerState.READY)
    instance = state.instances[0]
    stages = tuple(
        msgspec.structs.replace(stage, shard=Shard(0, 4, 4), rank=rank) for rank, stage in enumerate(instance.stages)
    )
    ranks = {"stages": stages, "rank_count": 2} if rank_count > 1 else {}
    instance = msgspec.structs.replace(instance, **ranks)
    wish = Wish(
        wish_id=instance.wish_id, card=CARD, node_count_min=1, context_length=512, slot_count=1, rank_count=asked_for
    )
    return msgspec.structs.replace(state, instances=(instance,), wishes=(wish,))


def no_place() -> Any:
    """The second of two wishes lost its node, and what is left is too small for it."""
    card = msgspec.structs.replace(CARD, model_id="Large-Chat", embedding_bytes=10**12)
    wish = Wish(wish_id="wish-2", card=card, node_count_min=2, context_length=1024, slot_count=2)
    return msgspec.structs.replace(cluster(RunnerState.READY, RunnerState.READY), wishes=(wish,))


def one_machine() -> Any:
    state = cluster()
    first, second = state.members
    assert first.report is not None
    assert second.report is not None
    shared = msgspec.structs.replace(second.report, hardware=first.report.hardware)
    return msgspec.structs.replace(state, members=(first, msgspec.structs.replace(second, report=shared)))


def one_machine_half_away() -> Any:
    first, second = one_machine().members
    gone = msgspec.structs.replace(first, visibility=Visibility.AWAY, heard_ms_ago=4200)
    return msgspec.structs.replace(one_machine(), members=(gone, second))


def starting(state: RunnerState, done: int) -> Any:
    """Two nodes that have the file, or look for it, or fetch it."""
    members = []
    for each in cluster(state, state).members:
        assert each.report is not None
        download = DownloadReport(
            model_id=CARD.model_id, state=DownloadState.ONGOING, bytes_done=done, bytes_total=CARD.file_bytes
        )
        runners = tuple(msgspec.structs.replace(runner, layers_loaded=0) for runner in each.report.runners)
        downloads = (download,) if state is RunnerState.IDLE else ()
        report = msgspec.structs.replace(each.report, runners=runners, downloads=downloads)
        members.append(msgspec.structs.replace(each, report=report))
    return msgspec.structs.replace(cluster(state, state), members=tuple(members))


def disk_is_full() -> Any:
    first, second = EMPTY.members
    assert second.report is not None
    full = msgspec.structs.replace(hardware("berta"), disk_bytes_available=3_000_000)
    notices = ("nothing can be kept in [/data]; free some space",)
    report = msgspec.structs.replace(second.report, hardware=full, notices=notices)
    members = (first, msgspec.structs.replace(second, report=report))
    return msgspec.structs.replace(EMPTY, members=members, notices=("no multicast",))


LAPTOP = ApiKey(key_id="0123456789ab", name="laptop", salt=b"s", digest=b"d", created_s=1_700_000_000)


def happened() -> Activity:
    activity = Activity()
    for instance_id in ("inst-1", "inst-2"):
        activity.hear(1_700_000_000_000, DeleteInstance(InstanceId(instance_id)), Refused("[red]it is\x1b not there"))
    return activity


SESSIONS: dict[str, tuple[dict[str, Any], list[list[str]]]] = {
    "listing": ({}, [["ps"], ["nodes"], ["models"]]),
    "listing_json": ({}, [["ps", "--json"], ["nodes", "--json"], ["models", "--json"]]),
    "nothing_placed": ({"current": EMPTY}, [["ps"], ["ps", "--json"]]),
    "loading": ({"current": LOADING}, [["ps"]]),
    "one_machine": ({"current": one_machine()}, [["nodes"]]),
    "one_machine_half_away": ({"current": one_machine_half_away()}, [["nodes"]]),
    "fewer_nodes": ({"current": fewer_nodes()}, [["ps"], ["ps", "--json"]]),
    "no_place": (
        {"current": no_place()},
        [["ps"], ["ps", "--json"], ["stop", "none-such"], ["stop", "Large-Chat"], ["stop", "wish-2"]],
    ),
    "looking": ({"current": starting(RunnerState.IDLE, 0)}, [["ps"]]),
    "downloading": ({"current": starting(RunnerState.IDLE, 1_000_000)}, [["ps"]]),
    "connecting": ({"current": starting(RunnerState.CONNECTING, 0)}, [["ps"]]),
    "failed": ({"current": FAILED}, [["ps"], ["place", "Tiny-Chat"], ["run", "Tiny-Chat", "Hi"]]),
    "away": ({"current": away()}, [["ps"], ["nodes"]]),
    "disk_is_full": ({"current": disk_is_full()}, [["nodes"]]),
    "run": ({}, [["run", "Tiny-Chat", "Say hello."], ["run", "tiny-chat", "Say", "hello."]]),
    "run_breaks": (
        {"events": (*ANSWER[:3], GenerationFailed("The node berta is lost."))},
        [["run", "Tiny-Chat", "Hi"]],
    ),
    "unknown_model": ({"current": EMPTY}, [["run", "GPT-9", "Hi"], ["place", "GPT-9"]]),
    "place": (
        {},
        [["place", "Tiny-Chat", "--another"], ["place", "Tiny-Chat", "--another", "--nodes", "2", "--json"]],
    ),
    "place_again": (
        {},
        [
            ["place", "tiny-chat", "--nodes", "2", "--context", "1000", "--slots", "2"],
            ["place", "Tiny-Chat", "--nodes", "3"],
            ["place", "Tiny-Chat", "--context", "2048"],
            ["place", "Tiny-Chat", "--slots", "3"],
        ],
    ),
    "place_one_of_two": (
        {"current": one_node_and_two()},
        [["place", "Tiny-Chat"], ["place", "Tiny-Chat", "--nodes", "2"], ["place", "Tiny-Chat", "--nodes", "3"]],
    ),
    "shared": (
        {"current": shared(2, 2)},
        [
            ["ps"],
            ["place", "Tiny-Chat"],
            ["place", "Tiny-Chat", "--tensor", "2"],
            ["place", "Tiny-Chat", "--tensor", "4"],
            ["place", "Tiny-Chat", "--tensor", "0"],
        ],
    ),
    "fewer_ranks": ({"current": shared(1, 2)}, [["ps"]]),
    "place_refused": (
        {"outcome": Refused("No node has 9 GB free: anna has 1 GB.", 409)},
        [["place", "Tiny-Chat", "--another"]],
    ),
    "keys": (
        {"outcome": Accepted(LAPTOP.key_id), "valid_keys": [LAPTOP]},
        [["keys", "add", "laptop"], ["keys", "list"], ["keys", "list", "--json"], ["keys", "revoke", "laptop"]],
    ),
    "keys_refused": (
        {"outcome": Refused("there is a key named 'laptop' already.", 409)},
        [["keys", "list"], ["keys", "add", "laptop"], ["keys", "add", "bad/name"], ["keys", "revoke", "a/b?c"]],
    ),
    "events": ({"happened": happened()}, [["events"], ["events", "--limit", "1", "--json"]]),
    "one_copy": (
        {"outcome": Accepted(InstanceId("inst-1"), on_one_node_only=True)},
        [["place", "Tiny-Chat", "--another"], ["place", "Tiny-Chat", "--another", "--json"], ["stop", "inst-1"]],
    ),
    "one_copy_of_one_node": (
        {"outcome": Accepted(InstanceId("inst-1"), on_one_node_only=True), "current": alone()},
        [["stop", "inst-1"]],
    ),
    "stop": ({}, [["stop", "81bf"], ["stop", "inst-1"], ["stop", "TINY-chat"], ["stop", "81b"], ["stop", "none-such"]]),
    "stop_one_of_two": (
        {"current": two_instances()},
        [["ps"], ["stop", "Tiny-Chat"], ["stop", "aaaaaaaa"], ["stop", "--all"]],
    ),
    "stop_nothing": ({"current": EMPTY}, [["stop", "Tiny-Chat"], ["stop", "--all"]]),
}


def session(node: ServedNode, commands: list[list[str]]) -> str:
    """Commands and what they print, standard error marked by "!"."""
    runner = CliRunner()
    text = ""
    for command in commands:
        done = runner.invoke(app, command, env={"COVEY_URL": node.url, "COLUMNS": "200"})
        errors = "".join(f"! {line.rstrip()}\n" for line in done.stderr.splitlines() if line.strip())
        output = "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())
        text += f"$ covey {' '.join(command)}\n{output}{errors}"
        text += f"[{done.exit_code}]\n" if done.exit_code else ""
    text = re.sub(r"covey_[0-9a-f]{12}_[0-9a-f]{40}", "KEY", text.replace(node.url, "URL"))
    text = re.sub(r'"id": "[0-9a-f]{8}-', '"id": "LIFE-', text)
    return re.sub(r'"created": \d+', '"created": 0', text)


@pytest.mark.parametrize("name", sorted(SESSIONS))
def test_session(name: str, node: ServedNode) -> None:
    changes, commands = SESSIONS[name]
    for field, value in changes.items():
        setattr(node.backend, field, value)
    check(GOLDEN / f"{name}.txt", session(node, commands))


def invoke(node: ServedNode, *arguments: str) -> Any:
    return CliRunner().invoke(app, arguments, env={"COVEY_URL": node.url})


def test_json_is_json_and_nothing_else(node: ServedNode) -> None:
    assert json.loads(invoke(node, "ps", "--json").stdout)[0]["nodes"][1]["layers"] == [2, 4]
    assert json.loads(invoke(node, "nodes", "--json").stdout)[0]["name"] == "anna"
    assert json.loads(invoke(node, "models", "--json").stdout)[0]["id"] == "Tiny-Chat"


def test_options_of_an_answer_reach_the_node(node: ServedNode) -> None:
    done = invoke(node, "run", "Tiny-Chat", "Hi", "--temperature", "0", "--max-tokens", "5")
    assert done.exit_code == 0
    (request,) = node.backend.requests
    assert (request.sampling.temperature, request.token_count_max) == (0, 5)
    assert request.messages[0].content == "Hi"


def test_a_model_that_is_placed_is_not_placed_again(node: ServedNode) -> None:
    invoke(node, "run", "TINY-chat", "Hi")
    assert node.backend.commands == []


def test_a_model_that_is_not_placed_is_placed_by_run(node: ServedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = node.backend.current
    node.backend.current = EMPTY

    async def submit(command: object) -> object:
        node.backend.commands.append(command)  # type: ignore[arg-type]
        node.backend.current = msgspec.structs.replace(ready, revision=8)
        return CommandResult("command-1", node.backend.outcome)

    monkeypatch.setattr(node.backend, "submit", submit)
    done = invoke(node, "run", "Tiny-Chat", "Hi")
    assert done.stdout == "Hello, world – 🐦\n"
    assert node.backend.commands == [PlaceModel(card=CARD)]


def test_a_first_failure_does_not_end_the_wait(node: ServedNode) -> None:
    """The node tries the runner again by itself, and the second time it comes up."""
    ready = node.backend.current
    node.backend.current = cluster(RunnerState.READY, RunnerState.FAILED, reason="load: broke", retries_left=3)

    async def wait_changed(revision: int, _: float) -> None:
        node.backend.current = msgspec.structs.replace(ready, revision=revision + 1)

    node.backend.wait_changed = wait_changed  # type: ignore[method-assign]
    done = invoke(node, "run", "Tiny-Chat", "Hi")
    assert (done.exit_code, done.stdout) == (0, "Hello, world – 🐦\n")


@pytest.mark.parametrize("command", [["place", "tiny-chat"], ["run", "tiny-chat", "Hi"]])
def test_what_failed_for_good_is_placed_anew_as_it_was(
    node: ServedNode, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's file was deleted, and is there again."""
    ready = node.backend.current
    failed = cluster(RunnerState.READY, RunnerState.FAILED, reason="loading: the model file is gone\nlog")
    node.backend.current = failed

    async def submit(command: Any) -> CommandResult:
        node.backend.commands.append(command)
        is_placed = isinstance(command, PlaceModel)
        node.backend.current = msgspec.structs.replace(ready if is_placed else EMPTY, revision=8)
        return CommandResult("command-1", node.backend.outcome)

    monkeypatch.setattr(node.backend, "submit", submit)
    done = invoke(node, *command)
    assert done.exit_code == 0
    assert done.stderr.startswith("Tiny-Chat failed: loading: the model file is gone. It is placed anew.\n")
    placed = PlaceModel(card=CARD, node_count_min=2, context_length=1024, slot_count=2)
    assert node.backend.commands == [DeleteInstance(InstanceId("inst-1")), placed]


def test_what_failed_gives_way_to_what_is_asked_for_now(node: ServedNode) -> None:
    node.backend.current = FAILED
    invoke(node, "place", "Tiny-Chat", "--slots", "3")
    assert node.backend.commands == [DeleteInstance(InstanceId("inst-1")), PlaceModel(card=CARD, slot_count=3)]


def wished(state: ClusterState, **changes: Any) -> ClusterState:
    """With the wish of its instance."""
    asked = Wish(wish_id="wish-1", card=CARD, node_count_min=1, context_length=1024, slot_count=2)
    return msgspec.structs.replace(state, wishes=(msgspec.structs.replace(asked, **changes),))


def test_what_failed_stays_on_the_nodes_that_were_chosen_for_it(node: ServedNode) -> None:
    node.backend.current = wished(FAILED, node_ids=(SECOND,))
    invoke(node, "place", "Tiny-Chat")
    placed = PlaceModel(card=CARD, context_length=1024, slot_count=2, node_ids=(SECOND,))
    assert node.backend.commands == [DeleteInstance(InstanceId("inst-1")), placed]


def test_what_failed_and_would_find_no_room_stays(node: ServedNode) -> None:
    """Its memory was taken by others since."""
    [first, second] = FAILED.members
    full = [
        msgspec.structs.replace(each, report=msgspec.structs.replace(each.report, hardware=small(each.node_id)))
        for each in (first, second)
        if each.report
    ]
    node.backend.current = msgspec.structs.replace(wished(FAILED), members=tuple(full))
    done = invoke(node, "place", "Tiny-Chat")
    assert done.exit_code == 1
    assert "It is left as it is, since it can't be placed anew: " in done.stderr
    assert node.backend.commands == []


def small(node_id: str) -> Hardware:
    return msgspec.structs.replace(hardware(node_id), memory_bytes_total=10**6, memory_bytes_available=10**5)


def test_room_that_the_failed_one_holds_is_room_for_the_next(node: ServedNode) -> None:
    """Of 6 GB that are free on each node 4.5 are still promised to its stages, which end with it."""
    huge = msgspec.structs.replace(CARD, layer_bytes=(2_000_000_000,) * 4, file_bytes=8_000_000_000)
    instance = FAILED.instances[0]
    stages = tuple(msgspec.structs.replace(each, memory_bytes=4_500_000_000) for each in instance.stages)
    held = msgspec.structs.replace(instance, card=huge, stages=stages)
    node.backend.current = msgspec.structs.replace(wished(FAILED, card=huge), instances=(held,))
    invoke(node, "place", "Tiny-Chat")
    assert node.backend.commands[:1] == [DeleteInstance(InstanceId("inst-1"))]


def test_what_failed_and_has_no_file_any_more_stays(node: ServedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(name: str) -> Any:
        raise RequestError(f"There is no file {name}.", status=404)

    node.backend.current = FAILED
    monkeypatch.setattr(node.backend, "resolve_model", resolve)
    done = invoke(node, "place", "Tiny-Chat")
    assert done.exit_code == 1
    assert "since it can't be placed anew: There is no file Tiny-Chat." in done.stderr
    assert node.backend.commands == []


def test_what_was_removed_and_then_refused_is_told(node: ServedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model took its room in between."""
    node.backend.current = FAILED

    async def submit(command: Any) -> CommandResult:
        node.backend.commands.append(command)
        is_placed = isinstance(command, PlaceModel)
        return CommandResult("command-1", Refused("No room.", 503) if is_placed else node.backend.outcome)

    monkeypatch.setattr(node.backend, "submit", submit)
    done = invoke(node, "place", "Tiny-Chat")
    assert done.exit_code == 1
    assert (
        "It was removed to make room for itself, and could not be placed then: No room. Nobody asks for it now: "
        in done.stderr
    )


def test_what_failed_is_not_rebalanced(node: ServedNode) -> None:
    node.backend.current = FAILED
    done = invoke(node, "rebalance", "Tiny-Chat")
    assert (done.exit_code, node.backend.commands, done.stdout) == (1, [], "")
    assert done.stderr.startswith("Tiny-Chat failed: the runner ended")
    assert "`covey place Tiny-Chat` tries again" in done.stderr


def later(node: ServedNode, *states: Any) -> None:
    """What the node sees after each next change; the last stays."""
    coming = iter(states)

    async def wait_changed(revision: int, _: float) -> None:
        node.backend.current = msgspec.structs.replace(next(coming, node.backend.current), revision=revision + 1)

    node.backend.wait_changed = wait_changed  # type: ignore[method-assign]


def as_wished(state: Any, instance_id: str) -> Any:
    """The state with its instance under another id, and the wish that it is for."""
    instance = msgspec.structs.replace(state.instances[0], instance_id=InstanceId(instance_id), wish_id="wish-1")
    wish = Wish(wish_id="wish-1", card=CARD, node_count_min=2, context_length=4096, slot_count=2)
    return msgspec.structs.replace(state, instances=(instance,), wishes=(wish,))


def test_a_wait_follows_what_is_assigned_anew(node: ServedNode) -> None:
    """A node of the first instance was lost while it loaded: the wish stands, and gets another."""
    ready, loading = as_wished(node.backend.current, "wish-1.a-1-2"), as_wished(LOADING, "wish-1.a-1-1")
    node.backend.current = loading
    later(node, msgspec.structs.replace(loading, instances=()), ready)
    done = invoke(node, "run", "Tiny-Chat", "Hi")
    assert (done.exit_code, done.stdout) == (0, "Hello, world – 🐦\n")


def test_a_wish_that_waits_for_a_place_is_not_made_a_second_time(node: ServedNode) -> None:
    ready = as_wished(node.backend.current, "wish-1.a-1-1")
    node.backend.current = msgspec.structs.replace(ready, instances=())
    later(node, ready)
    done = invoke(node, "run", "tiny-chat", "Hi")
    assert (done.exit_code, done.stdout) == (0, "Hello, world – 🐦\n")
    assert node.backend.commands == []


def test_a_wait_ends_when_the_wish_does(node: ServedNode) -> None:
    node.backend.current = as_wished(LOADING, "wish-1.a-1-1")
    later(node, EMPTY)
    done = invoke(node, "place", "Tiny-Chat")
    assert (done.exit_code, done.stderr) == (1, "The instance was removed while it was being made ready.\n")


def test_a_wait_ends_when_there_is_no_place_any_more(node: ServedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "ASSIGN_SECONDS_MAX", 0.0)
    node.backend.current = loading = as_wished(LOADING, "wish-1.a-1-1")
    alone = msgspec.structs.replace(away(), wishes=loading.wishes, instances=())
    later(node, alone)
    done = invoke(node, "place", "Tiny-Chat")
    assert done.exit_code == 1
    assert done.stderr.startswith("Tiny-Chat finds no place: ")
    assert done.stderr.replace("\n", " ").endswith("It is placed as soon as there is one; `covey ps` shows it. ")


def test_a_wait_for_what_never_comes_ends_though_nothing_changes(
    node: ServedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "ASSIGN_SECONDS_MAX", 0.3)
    monkeypatch.setattr(event_stream, "SILENCE_S_MAX", 0.1)
    node.backend.current = EMPTY
    done = invoke(node, "place", "Tiny-Chat")
    assert (done.exit_code, done.stderr) == (1, "The instance was removed while it was being made ready.\n")


def test_what_is_placed_is_not_placed_a_second_time_by_mistake(node: ServedNode) -> None:
    done = invoke(node, "place", "TINY-chat")
    assert (done.exit_code, node.backend.commands) == (0, [])
    invoke(node, "place", "Tiny-Chat", "--another", "--nodes", "2", "--context", "512", "--slots", "3")
    assert node.backend.commands == [PlaceModel(card=CARD, node_count_min=2, context_length=512, slot_count=3)]


@pytest.mark.parametrize("option", ["--slots", "--nodes", "--context"])
def test_an_option_out_of_range_is_told_of_by_its_own_name(node: ServedNode, option: str) -> None:
    done = invoke(node, "place", "Tiny-Chat", option, "5000000000")
    assert (done.exit_code, node.backend.commands) == (2, [])
    assert f"'{option}'" in done.stderr
    assert "less than or equal to" in " ".join(done.stderr.replace("│", " ").split())


def test_exact_is_asked_for_and_checked(node: ServedNode) -> None:
    """The instance that comes back here is none, as from a leader of an older version."""
    done = invoke(node, "place", "Tiny-Chat", "--another", "--exact")
    assert node.backend.commands == [PlaceModel(card=CARD, exact=True)]
    assert (done.exit_code, "not as --exact" in done.stderr) == (1, True)
    for command in (["place", "Tiny-Chat", "--exact"], ["run", "Tiny-Chat", "Hi", "--exact"]):
        done = invoke(node, *command)
        assert (done.exit_code, "otherwise than asked for" in done.stderr) == (1, True)
    exact = [msgspec.structs.replace(each, exact=True) for each in node.backend.current.instances]
    node.backend.current = msgspec.structs.replace(node.backend.current, instances=tuple(exact))
    assert invoke(node, "place", "Tiny-Chat", "--exact").exit_code == 0
    assert invoke(node, "place", "Tiny-Chat").exit_code == 0
    assert "Tiny-Chat (exact)" in " ".join(invoke(node, "ps").stdout.split())
    assert msgspec.json.decode(invoke(node, "ps", "--json").stdout)[0]["exact"]


def test_quantising_is_asked_for_and_checked(node: ServedNode) -> None:
    """As above, the instance that comes back first is as from a leader of an older version."""
    done = invoke(node, "place", "Tiny-Chat", "--another", "--quantize", "q4")
    assert node.backend.commands == [PlaceModel(card=CARD, quantize=Quantizing.Q4)]
    assert (done.exit_code, "not as --quantize q4" in done.stderr) == (1, True)
    quantized = [msgspec.structs.replace(each, quantize=Quantizing.Q4) for each in node.backend.current.instances]
    node.backend.current = msgspec.structs.replace(node.backend.current, instances=tuple(quantized))
    for command in (["place", "Tiny-Chat", "--quantize", "q8"], ["run", "Tiny-Chat", "Hi", "--quantize", "q8"]):
        done = invoke(node, *command)
        assert (done.exit_code, "otherwise than asked for" in done.stderr) == (1, True)
        assert "asked for: with --quantize q4, not q8." in " ".join(done.stderr.split())
    assert invoke(node, "place", "Tiny-Chat", "--quantize", "q4").exit_code == 0
    assert invoke(node, "place", "Tiny-Chat").exit_code == 0
    assert "Tiny-Chat (q4)" in " ".join(invoke(node, "ps").stdout.split())
    assert msgspec.json.decode(invoke(node, "ps", "--json").stdout)[0]["quantize"] == "q4"


def test_what_there_is_to_quantise_to_is_named(node: ServedNode) -> None:
    for command in (["place", "Tiny-Chat"], ["run", "Tiny-Chat", "Hi"]):
        done = invoke(node, *command, "--quantize", "q5")
        assert (done.exit_code, node.backend.commands) == (2, [])
        assert "'q5' is not one of 'q4', 'q8'" in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize("command", [["run", "Hi"], ["place"]])
def test_a_name_of_a_hub_is_not_taken_for_a_path(
    node: ServedNode, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(node, command[0], "anna/Tiny-GGUF", *command[1:])
    sentence = "there is no such file here; a file of the Hugging Face hub is named hf:anna/Tiny-GGUF/FILE.gguf."
    assert (done.exit_code, done.stderr) == (1, f"anna/Tiny-GGUF: {sentence}\n")
    Path("anna").mkdir()
    Path("anna/Tiny-GGUF").touch()
    assert f"There is no model '{tmp_path}/anna/Tiny-GGUF'" in invoke(node, "place", "anna/Tiny-GGUF").stderr


def test_the_home_of_nobody_is_a_path_like_others(
    node: ServedNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(node, "run", "~nobody-of-that-name/x.gguf", "Hi")
    assert done.exit_code == 1
    assert "~nobody-of-that-name/x.gguf" in done.stderr


def test_a_path_that_cant_be_looked_at_is_told_of(
    node: ServedNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("anna").mkdir()
    name = f"anna/{'x' * 300}.gguf"
    done = invoke(node, "place", name)
    assert (done.exit_code, done.stderr) == (1, f"{name} can't be looked at (File name too long): check the path.\n")


@pytest.mark.parametrize(
    ("url", "is_here"),
    [
        ("http://127.0.0.1:52415", True),
        ("localhost", True),
        ("http://[::1]:52415", True),
        ("berta", False),
        ("http://192.168.1.7:52415", False),
    ],
)
def test_a_path_is_looked_up_where_the_node_is(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_here: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    if is_here:
        with pytest.raises(CliError, match="there is no such file here"):
            model_to_place("models/m.gguf", address(url))
    else:
        assert model_to_place("models/m.gguf", address(url)) == f"{tmp_path}/models/m.gguf"


def test_an_address_reaches_the_node_as_it_is(node: ServedNode) -> None:
    url = "https://huggingface.co/a/b/resolve/main/c.gguf"
    assert f"There is no model '{url}'" in invoke(node, "place", url).stderr


@pytest.mark.parametrize("name", ["81bf", "81BF9124", "inst-1", "Tiny-Chat"])
def test_stopping_by_a_name(node: ServedNode, name: str) -> None:
    invoke(node, "stop", name)
    assert node.backend.commands == [DeleteInstance(InstanceId("inst-1"))]


def test_stopping_all(node: ServedNode) -> None:
    node.backend.current = two_instances()
    invoke(node, "stop", "--all")
    assert node.backend.commands == [DeleteInstance(each.instance_id) for each in two_instances().instances]


def test_markup_in_what_others_wrote_is_text(node: ServedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(_: str) -> object:
        raise RequestError("[/bold] is not [red]markup[/red].")

    monkeypatch.setattr(node.backend, "resolve_model", refuse)
    done = invoke(node, "place", "x")
    assert (done.exit_code, done.stderr.strip()) == (1, "[/bold] is not [red]markup[/red].")


def test_markup_in_a_table_is_text(node: ServedNode) -> None:
    node.backend.current = cluster(RunnerState.READY, RunnerState.FAILED, reason="[/bold]\x1b is not [red]markup[/red]")
    done = CliRunner().invoke(app, ["ps"], env={"COVEY_URL": node.url, "COLUMNS": "200"})
    assert (done.exit_code, done.exception) == (0, None)
    assert "failed: [/bold]\ufffd is not [red]markup[/red]" in done.stdout


def printed(listing: Listing, width: int, *, is_terminal: bool = True) -> list[str]:
    with Console(width=width, force_terminal=is_terminal, color_system=None) as console, console.capture() as output:
        console.print(listing)
    return output.get().splitlines()


def long_names() -> Any:
    two = two_instances()
    card = msgspec.structs.replace(CARD, model_id="/home/anna/models/Llama-3.2-1B-Instruct.Q4_1.gguf")
    instances = tuple(msgspec.structs.replace(each, card=card, context_length=131072) for each in two.instances)
    return msgspec.structs.replace(two, instances=instances)


EVENT = {"at": "2026-06-22T10:00:00.000000Z", "text": "Tiny-Chat is placed on anna and berta."}
MODEL = {"id": "SmolLM2-135M-Instruct", "file_bytes": 98e6, "quantization": "Q4_1", "context_length": 8192}


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_nothing_is_cut_on_a_narrow_terminal(width: int) -> None:
    listings = [
        tables.instances_table(tables.instance_rows(long_names())),
        tables.layers_table(tables.instance_rows(long_names())[0]["nodes"]),
        tables.nodes_table(tables.node_rows(away())),
        tables.events_table([EVENT]),
        tables.models_table([{**MODEL, "downloaded": True}]),
    ]
    for listing in listings:
        lines = printed(listing, width)
        shown = re.sub(r"\s", "", "".join(lines))
        assert max(len(line) for line in lines) <= width
        assert "…" not in shown


def test_what_matters_is_left_on_a_narrow_terminal() -> None:
    instances = tables.instances_table(tables.instance_rows(long_names()))
    assert printed(instances, 40)[0].split() == ["instance", "model", "status", "node"]
    assert printed(instances, 30)[0].split() == ["instance", "model", "status"]
    assert all(line.strip() for line in printed(instances, 30)[:-1])
    nodes = tables.nodes_table(tables.node_rows(away()))
    assert printed(nodes, 40)[0].split() == ["node", "id", "seen", "role"]
    assert printed(nodes, 80)[0].split() == ["node", "id", "seen", "cores", "memory", "free", "role"]
    assert printed(tables.events_table([EVENT]), 40)[1].rstrip() == "2026-06-22 10:00:00  Tiny-Chat is placed"


def test_what_a_person_copies_is_whole_on_a_narrow_terminal() -> None:
    lines = printed(tables.instances_table(tables.instance_rows(long_names())), 80)
    assert [line[:8] for line in lines if line.startswith(("860", "d15"))] == ["86052a1d", "d153362c"]


def test_a_pipe_gets_a_line_for_each_row_and_no_blanks_at_its_end(node: ServedNode) -> None:
    node.backend.current = cluster(RunnerState.READY, RunnerState.FAILED, reason="It broke " * 40 + "\nlast\nline")
    for command in ("ps", "nodes", "models", "events"):
        lines = invoke(node, command).stdout.splitlines()
        assert lines == [line.rstrip() for line in lines]
    assert "It broke " * 39 in invoke(node, "ps").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["place"],
        ["place", "x", "--nodes", "0"],
        ["dance"],
        ["run", "x", "y", "--max-tokens", "0"],
        ["up", "--port", "x"],
        ["up", "--no-auth", "--require-key"],
        ["keys"],
        ["keys", "revoke"],
        ["stop"],
        ["stop", "x", "--all"],
        ["events", "--limit", "0"],
    ],
)
def test_wrong_usage_is_exit_status_2(node: ServedNode, arguments: list[str]) -> None:
    assert invoke(node, *arguments).exit_code == 2


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://127.0.0.1:9", "No node answers at http://127.0.0.1:9. Start one with `covey up`"),
        ("127.0.0.1:9", "No node answers at http://127.0.0.1:9. Start one with `covey up`"),
        (
            "ftp://127.0.0.1:9",
            "'ftp://127.0.0.1:9' is not the address of a node: write it as HOST:PORT or http://HOST:PORT.",
        ),
        ("http://127.0.0.1:port", "is not the address of a node"),
        ("http://127.0.0.1:99999", "is not the address of a node"),
        ("http://[::1", "is not the address of a node"),
        ("http://", "is not the address of a node"),
        ("a b", "is not the address of a node"),
        (" ", "is not the address of a node"),
    ],
)
def test_no_node_there(url: str, sentence: str) -> None:
    done = CliRunner().invoke(app, ["ps"], env={"COVEY_URL": url})
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("attic", "http://attic:52415"),
        ("attic:53000", "http://attic:53000"),
        ("::1", "http://[::1]:52415"),
        ("[::1]:53000", "http://[::1]:53000"),
        ("http://attic:53000/", "http://attic:53000"),
        ("http://127.0.0.1:53000/v1", "http://127.0.0.1:53000"),
        ("https://covey.example", "https://covey.example"),
        ("https://example.org/covey/", "https://example.org/covey"),
    ],
)
def test_an_address_as_people_write_it(written: str, meant: str) -> None:
    assert address(written) == meant


def test_a_key_from_the_environment_goes_along(node: ServedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COVEY_API_KEY", " covey_1_2\n")
    with NodeClient(node.url) as client:
        assert client._http.headers["authorization"] == "Bearer covey_1_2"
    monkeypatch.setenv("COVEY_API_KEY", "schlüssel")
    done = invoke(node, "ps")
    assert (done.exit_code, done.stderr.startswith("COVEY_API_KEY is not an API key")) == (1, True)


def test_something_else_listens_there(node: ServedNode) -> None:
    done = CliRunner().invoke(app, ["ps"], env={"COVEY_URL": f"{node.url}/state"})
    assert done.exit_code == 1
    assert len(done.stderr.strip().splitlines()) == 1


class Stranger(BaseHTTPRequestHandler):
    """Another program: to whatever it is asked it gives one answer."""

    status = 200
    body = b""

    def answer(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_POST = do_DELETE = answer  # noqa: N815 (as the library calls them)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def stranger(status: int, body: bytes) -> Iterator[str]:
    handler = type("Handler", (Stranger,), {"status": status, "body": body})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(10)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"<!doctype html><title>A router</title>"),
        (200, b"[]"),
        (200, b'{"object": "list", "data": [{"id": "llama3", "object": "model", "owned_by": "library"}]}'),
        (200, b'{"key_id": "\xff", "instance_id": "\xff", "key": "\xff", "data": "\xff"}'),
        (404, b"<h1>Not found</h1>"),
        (500, b'"\xff"'),
    ],
)
def test_another_program_listens_there(status: int, body: bytes) -> None:
    commands = ["models", "place x", "ps", "nodes", "events", "run x y", "keys list", "keys add a", "keys revoke a"]
    with stranger(status, body) as url:
        for command in [*commands, "stop x"]:
            done = CliRunner().invoke(app, command.split(), env={"COVEY_URL": url, "COLUMNS": "200"})
            assert isinstance(done.exception, SystemExit), (command, done.exception)
            assert (done.exit_code, done.stdout) == (1, "")
            assert done.stderr.startswith(f"No Covey node of this version answers at {url}, but something else does (")
            assert done.stderr.count("\n") == 1


def test_a_stream_of_another_program_is_none_of_ours() -> None:
    with stranger(200, b"data: <html>\n\n") as url, NodeClient(url) as client:
        for events in (client.changes(), client.generate({})):
            with pytest.raises(CliError, match="No Covey node of this version answers"):
                list(events)


def test_short_ids_stay_what_they_are() -> None:
    ids = [each.instance_id for each in two_instances().instances]
    assert list(short_ids(ids).values()) == ["86052a1d", "d153362c"]
    assert list(short_ids(ids[:1]).values()) == ["86052a1d"]
    assert list(short_ids(["id-10014", "id-22672"]).values()) == ["c9184ee7b", "c9184ee7e"]  # alike so far


def test_what_a_node_says_of_an_instance_is_told_with_its_short_id(node: ServedNode) -> None:
    first, _ = two_instances().instances
    short = short_ids([first.instance_id])[first.instance_id]
    refused = f"there is no instance {first.instance_id}: `covey ps` lists those there are."
    node.backend.happened.hear(1_700_000_000_000, DeleteInstance(first.instance_id), Refused(refused))
    assert f"Removing {short} was refused: there is no instance {short}: `covey" in invoke(node, "events").stdout
    failed = cluster(RunnerState.READY, RunnerState.FAILED, reason="It broke.")
    node.backend.current = msgspec.structs.replace(failed, instances=(as_failed(failed, first.instance_id),))
    node.backend.outcome = Accepted(first.instance_id)  # what is placed anew fails again
    assert f"`covey stop {short}` gives up on it." in invoke(node, "run", "Tiny-Chat", "Hi").stderr


def as_failed(state: Any, instance_id: str) -> Any:
    return msgspec.structs.replace(state.instances[0], instance_id=instance_id)


def test_the_fake_is_the_one_that_the_api_tests_use(node: ServedNode) -> None:
    assert isinstance(node.backend, FakeBackend)
