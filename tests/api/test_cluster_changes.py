"""Somebody follows the cluster by its changes only, loses the connection now and then, and still sees what there is."""

from hypothesis import given
from hypothesis import strategies as st
from msgspec import json
from msgspec.structs import replace

from covey.api.cluster_changes import REMOVALS_MAX, ClusterChange, ClusterFeed, applied, without_ages
from covey.schema.cluster import ClusterState, Member, Visibility
from covey.schema.ids import InstanceId, NodeId
from covey.schema.runner import RunnerState
from tests.api.fake_backend import cluster, instance

ids = st.sampled_from(["a", "b", "c"])
members = st.builds(
    lambda ids, age, away: tuple(
        Member(
            node_id=NodeId(name),
            visibility=Visibility.AWAY if name in away else Visibility.VISIBLE,
            heard_ms_ago=age,
            report=None,
        )
        for name in sorted(ids)
    ),
    st.sets(ids),
    st.integers(0, 9),
    st.sets(ids),
)
instances = st.builds(
    lambda ids: tuple(replace(instance(), instance_id=InstanceId(name)) for name in sorted(ids)), st.sets(ids)
)
states = st.builds(
    ClusterState,
    node_id=st.just(NodeId("a")),
    leader=st.none() | ids,
    revision=st.integers(0, 99),
    members=members,
    wishes=st.just(()),
    instances=instances,
    notices=st.lists(st.sampled_from(["another cluster is here", "multicast does not work"]), max_size=2).map(tuple),
)


@given(st.lists(st.tuples(states, st.booleans()), min_size=1, max_size=12))
def test_the_changes_make_the_state(looks: list[tuple[ClusterState, bool]]) -> None:
    feed, last_id, seen = ClusterFeed("life"), None, None
    for state, listens in looks:
        feed.see(state)
        if not listens:
            continue
        event = feed.since(last_id)
        last_id = feed.last_id
        if isinstance(event, ClusterState):
            assert seen is None  # only once
            seen = event
        elif event is not None:
            assert seen is not None
            seen = applied(seen, json.decode(json.encode(event), type=ClusterChange))
        assert seen is not None
        assert without_ages(seen) == without_ages(state)


@given(states, states)
def test_a_change_names_only_what_differs(before: ClusterState, after: ClusterState) -> None:
    feed = ClusterFeed("life")
    feed.see(before)
    known = feed.last_id
    feed.see(after)
    change = feed.since(known)
    old, new = {m.node_id for m in before.members}, {m.node_id for m in after.members}
    if change is None:
        assert without_ages(before) == without_ages(after)
        return
    assert isinstance(change, ClusterChange)
    assert set(change.added.members) == new - old
    assert set(change.removed.members) == old - new
    assert set(change.changed.members) <= old & new


def test_whoever_missed_more_removals_than_are_remembered_starts_anew() -> None:
    feed = ClusterFeed("life")
    feed.see(cluster(RunnerState.READY, RunnerState.READY))
    known = feed.last_id
    for number in range(REMOVALS_MAX + 2):
        one = replace(instance(), instance_id=InstanceId(f"inst-{number}"))
        feed.see(replace(cluster(), instances=(one,), revision=number))
    assert isinstance(feed.since(known), ClusterState)
    assert isinstance(feed.since(f"life-{REMOVALS_MAX}"), ClusterChange)
