"""API keys are intent: the same everywhere, added once, revoked for good."""

import pytest
from msgspec.structs import replace

from covey.control.cluster import Cluster, Context, Decision
from covey.control.keys import KEYS_MAX
from covey.schema.cluster import Accepted, AddKey, ApiKey, Command, Refused, RevokeKey
from covey.schema.ids import NodeId

LAPTOP = ApiKey(key_id="0" * 12, name="laptop", salt=b"s", digest=b"d", created_s=1)
PHONE = ApiKey(key_id="1" * 12, name="phone", salt=b"s", digest=b"d", created_s=2)

CONTEXT = Context(command_id="command", asked_at=None, instance_mark="a-1-1", engine="fake", nodes=())


def carry_out(cluster: Cluster, command: Command) -> str:
    decision = cluster.decide(command, CONTEXT)
    assert isinstance(decision, Decision), decision
    assert isinstance(decision.outcome, Accepted)
    cluster.apply(decision.events)
    return decision.outcome.effect_id


def refusal(cluster: Cluster, command: Command) -> Refused:
    refused = cluster.decide(command, CONTEXT)
    assert isinstance(refused, Refused)
    return refused


@pytest.fixture
def cluster() -> Cluster:
    cluster = Cluster(NodeId("a"))
    assert carry_out(cluster, AddKey(LAPTOP)) == LAPTOP.key_id
    return cluster


def test_a_key_is_valid_at_every_node_that_has_merged(cluster: Cluster) -> None:
    other = Cluster(NodeId("b"))
    other.merge(cluster.entries)
    assert other.keys == {LAPTOP.key_id: LAPTOP}
    carry_out(other, RevokeKey("laptop"))
    cluster.merge(other.entries)
    assert cluster.keys == {}


def test_the_same_command_again_adds_nothing_and_revives_nothing(cluster: Cluster) -> None:
    carry_out(cluster, AddKey(LAPTOP))
    assert len(cluster.keys) == 1
    carry_out(cluster, RevokeKey(LAPTOP.key_id))
    carry_out(cluster, AddKey(LAPTOP))
    assert cluster.keys == {}
    assert carry_out(cluster, RevokeKey(LAPTOP.key_id)) == LAPTOP.key_id


def test_a_name_is_taken_until_its_key_is_revoked(cluster: Cluster) -> None:
    again = replace(PHONE, name="laptop")
    assert refusal(cluster, AddKey(again)).status == 409
    carry_out(cluster, RevokeKey("laptop"))
    carry_out(cluster, AddKey(again))


def test_an_unknown_key_is_not_found_and_the_known_are_named(cluster: Cluster) -> None:
    refused = refusal(cluster, RevokeKey("phone"))
    assert (refused.status, refused.reason) == (404, "there is no key 'phone'; there are: laptop.")


def test_two_keys_of_one_name_are_told_apart_by_id(cluster: Cluster) -> None:
    """Two leaders, apart for a while, each added one."""
    other = Cluster(NodeId("b"))
    carry_out(other, AddKey(replace(PHONE, name="laptop")))
    cluster.merge(other.entries)
    refused = refusal(cluster, RevokeKey("laptop"))
    assert (refused.status, LAPTOP.key_id in refused.reason, PHONE.key_id in refused.reason) == (409, True, True)
    carry_out(cluster, RevokeKey(PHONE.key_id))
    assert list(cluster.keys) == [LAPTOP.key_id]


def test_an_id_is_meant_before_a_name(cluster: Cluster) -> None:
    carry_out(cluster, AddKey(replace(PHONE, name=LAPTOP.key_id)))
    carry_out(cluster, RevokeKey(LAPTOP.key_id))
    assert list(cluster.keys) == [PHONE.key_id]


def test_keys_have_a_limit(cluster: Cluster) -> None:
    for number in range(KEYS_MAX - 1):
        carry_out(cluster, AddKey(replace(PHONE, key_id=str(number), name=str(number))))
    assert refusal(cluster, AddKey(PHONE)).status == 409
