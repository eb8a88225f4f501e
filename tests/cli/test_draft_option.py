"""A draft at the terminal: asked for by name or path, checked in what comes back, and shown in the lists."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from covey.cli.placing import Wanted
from covey.schema.cluster import PlaceModel, Wish
from covey.schema.runner import RunnerState
from tests.api.fake_backend import CARD, DRAFT, cluster
from tests.cli.served_node import ServedNode
from tests.cli.test_sessions import FAILED, invoke


def drafted(state: Any) -> Any:
    instances = tuple(msgspec.structs.replace(each, draft=DRAFT) for each in state.instances)
    return msgspec.structs.replace(state, instances=instances)


def test_a_draft_is_asked_for_and_checked(node: ServedNode) -> None:
    """The instance that comes back first is as from a leader of an older version, which knows no drafts."""
    done = invoke(node, "place", "Tiny-Chat", "--another", "--draft", "Tiny-Draft")
    assert node.backend.commands == [PlaceModel(card=CARD, draft=DRAFT)]
    assert (done.exit_code, "not as --draft Tiny-Draft" in done.stderr) == (1, True)
    node.backend.current = drafted(node.backend.current)
    for command in (["place", "Tiny-Chat"], ["run", "Tiny-Chat", "Hi"]):
        other = invoke(node, *command, "--draft", "Tiny-Other")
        assert (other.exit_code, "otherwise than asked for" in other.stderr) == (1, True)
        assert "asked for: with --draft Tiny-Draft, not Tiny-Other." in " ".join(other.stderr.split())
        assert invoke(node, *command, "--draft", "tiny-draft").exit_code == 0
        assert invoke(node, *command).exit_code == 0
    assert node.backend.commands[1:] == []


def test_the_lists_show_the_draft(node: ServedNode) -> None:
    assert msgspec.json.decode(invoke(node, "ps", "--json").stdout)[0]["draft"] is None
    node.backend.current = drafted(node.backend.current)
    assert "Tiny-Chat (draft Tiny-Draft)" in " ".join(invoke(node, "ps").stdout.split())
    assert msgspec.json.decode(invoke(node, "ps", "--json").stdout)[0]["draft"] == "Tiny-Draft"


def test_what_waits_for_a_place_shows_its_draft_too(node: ServedNode) -> None:
    wish = Wish(wish_id="wish-9", card=CARD, node_count_min=1, context_length=512, slot_count=1, draft=DRAFT)
    node.backend.current = msgspec.structs.replace(cluster(), wishes=(wish,))
    assert msgspec.json.decode(invoke(node, "ps", "--json").stdout)[0]["draft"] == "Tiny-Draft"


def test_the_path_of_a_draft_is_meant_from_where_the_command_runs(
    node: ServedNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(node, "place", "Tiny-Chat", "--another", "--draft", "small.gguf")
    assert f"There is no model '{tmp_path}/small.gguf'" in done.stderr
    hub = invoke(node, "place", "Tiny-Chat", "--another", "--draft", "anna/Tiny-GGUF")
    assert "a file of the Hugging Face hub is named hf:anna/Tiny-GGUF/FILE.gguf" in hub.stderr
    assert node.backend.commands == []


def test_what_failed_is_placed_anew_with_its_draft(node: ServedNode) -> None:
    node.backend.current = drafted(FAILED)
    invoke(node, "place", "Tiny-Chat")
    [_, placed] = node.backend.commands
    assert isinstance(placed, PlaceModel)
    assert placed.draft == DRAFT


def test_what_failed_is_left_where_the_draft_that_is_asked_for_now_is_not_known(node: ServedNode) -> None:
    node.backend.current = drafted(FAILED)
    done = invoke(node, "place", "Tiny-Chat", "--draft", "GPT-9")
    assert "It is left as it is, since it can't be placed anew: There is no model 'GPT-9'" in done.stderr
    assert node.backend.commands == []


def test_a_draft_is_no_wish_for_none() -> None:
    """Who does not name one takes what is there, as with the other ways to place a model."""
    [with_draft] = drafted(cluster(RunnerState.READY, RunnerState.READY)).instances
    [without] = cluster(RunnerState.READY, RunnerState.READY).instances
    assert Wanted().is_met_by(with_draft)
    assert Wanted(draft="TINY-draft").is_met_by(with_draft)
    assert not Wanted(draft="Tiny-Draft").is_met_by(without)
