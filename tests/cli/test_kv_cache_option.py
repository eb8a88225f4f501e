"""The type of the KV cache at the terminal; and that a refusal to place something else names what differs."""

from typing import Any

import msgspec
import pytest

from covey.cli.placing import Wanted
from covey.schema.cluster import PlaceModel
from covey.schema.model import KvCacheType, Quantizing
from covey.schema.runner import RunnerState
from tests.api.fake_backend import CARD, DRAFT, cluster
from tests.cli.served_node import ServedNode
from tests.cli.test_sessions import FAILED, invoke


def halved(state: Any) -> Any:
    instances = tuple(msgspec.structs.replace(each, kv_cache=KvCacheType.F16) for each in state.instances)
    return msgspec.structs.replace(state, instances=instances)


def test_it_is_asked_for_and_checked(node: ServedNode) -> None:
    """The instance that comes back first is as from a leader of an older version, which knows no such option."""
    done = invoke(node, "place", "Tiny-Chat", "--another", "--kv-cache", "f16")
    assert node.backend.commands == [PlaceModel(card=CARD, kv_cache=KvCacheType.F16)]
    assert (done.exit_code, "not as --kv-cache f16" in done.stderr) == (1, True)
    for command in (["place", "Tiny-Chat"], ["run", "Tiny-Chat", "Hi"]):
        other = invoke(node, *command, "--kv-cache", "f16")
        assert (other.exit_code, "asked for: with --kv-cache f32, not f16. `covey stop" in other.stderr) == (1, True)
    node.backend.current = halved(node.backend.current)
    for options in (["--kv-cache", "f16"], []):
        assert invoke(node, "place", "Tiny-Chat", *options).exit_code == 0
    assert "with --kv-cache f16, not f32." in invoke(node, "place", "Tiny-Chat", "--kv-cache", "f32").stderr
    assert node.backend.commands[1:] == []


def test_another_type_is_refused_and_those_there_are_are_named(node: ServedNode) -> None:
    for command in (["place", "Tiny-Chat"], ["run", "Tiny-Chat", "Hi"]):
        done = invoke(node, *command, "--kv-cache", "q8")
        told = " ".join(done.stderr.replace("│", " ").split())
        assert (done.exit_code, "--kv-cache" in told, "'f32', 'f16'" in told) == (2, True, True)
    assert node.backend.commands == []


def test_the_lists_show_it_where_it_is_not_the_usual_one(node: ServedNode) -> None:
    assert "KV cache" not in invoke(node, "ps").stdout
    assert msgspec.json.decode(invoke(node, "ps", "--json").stdout)[0]["kv_cache"] == "f32"
    node.backend.current = halved(node.backend.current)
    assert "Tiny-Chat (KV cache f16)" in " ".join(invoke(node, "ps").stdout.split())
    assert msgspec.json.decode(invoke(node, "ps", "--json").stdout)[0]["kv_cache"] == "f16"


def test_what_failed_is_placed_anew_with_it(node: ServedNode) -> None:
    node.backend.current = halved(FAILED)
    invoke(node, "place", "Tiny-Chat")
    [_, placed] = node.backend.commands
    assert isinstance(placed, PlaceModel)
    assert placed.kv_cache is KvCacheType.F16


# ---- what differs ----

READY = RunnerState.READY


@pytest.mark.parametrize(
    ("wanted", "missed"),
    [
        (Wanted(), []),
        (Wanted(node_count=2, context_length=1024, slot_count=1, rank_count=1, kv_cache=KvCacheType.F32), []),
        (Wanted(node_count=3), ["on 2 nodes, not 3"]),
        (Wanted(context_length=2048), ["with a context of 1024 tokens, not 2048"]),
        (Wanted(slot_count=8), ["with 2 slots, not 8"]),
        (Wanted(exact=True), ["without --exact"]),
        (Wanted(quantize=Quantizing.Q4), ["without --quantize q4"]),
        (Wanted(rank_count=2), ["with --tensor 1, not 2"]),
        (Wanted(draft="Tiny-Draft"), ["without --draft Tiny-Draft"]),
        (Wanted(kv_cache=KvCacheType.F16), ["with --kv-cache f32, not f16"]),
        (Wanted(slot_count=3, exact=True), ["with 2 slots, not 3", "without --exact"]),
    ],
)
def test_each_option_that_differs_is_named(wanted: Wanted, missed: list[str]) -> None:
    [instance] = cluster(READY, READY).instances
    assert wanted.missed_by(instance) == missed
    assert wanted.is_met_by(instance) is not bool(missed)


def test_what_it_is_instead_is_said(node: ServedNode) -> None:
    [instance] = cluster(READY, READY).instances
    other = msgspec.structs.replace(instance, quantize=Quantizing.Q8, draft=DRAFT, rank_count=2)
    missed = Wanted(quantize=Quantizing.Q4, draft="Tiny-Other", rank_count=1).missed_by(other)
    assert missed == ["with --quantize q8, not q4", "with --tensor 2, not 1", "with --draft Tiny-Draft, not Tiny-Other"]
    done = invoke(node, "place", "Tiny-Chat", "--nodes", "3", "--slots", "3", "--exact")
    assert "otherwise than asked for: on 2 nodes, not 3, with 2 slots, not 3 and without --exact." in done.stderr
