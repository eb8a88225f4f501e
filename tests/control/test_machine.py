"""The whole machine in a world without faults, and at its edges."""

from random import Random

from msgspec.structs import replace

from covey.control.cluster import Written
from covey.control.machine import Machine
from covey.control.routing import head_addresses, instance_status, pick, ready_instances
from covey.control.settings import MachineSettings
from covey.schema.cluster import (
    Accepted,
    Claim,
    ClusterState,
    CommandAnswer,
    CommandOutcome,
    CommandRequest,
    DeleteInstance,
    Heartbeat,
    InstancePhase,
    NodeReport,
    PlaceModel,
    Refused,
    TimedOut,
)
from covey.schema.ids import InstanceId, ModelId, NodeId, RunnerId
from covey.schema.machine import (
    AnswerCommand,
    CommandSubmitted,
    DeadlinePassed,
    Effect,
    EntriesKept,
    FetchFailed,
    HardwareProbed,
    KeepEntries,
    LeaveRequested,
    Left,
    MessageReceived,
    ModelsListed,
    Publish,
    SendTo,
    Started,
    StateChanged,
)
from covey.schema.runner import Address, LoadProgressed
from simulation.faults import Faults
from simulation.host import Host
from simulation.people import HUGE, LARGE, SMALL
from simulation.world import World

GIGABYTE = 10**9
ADA = NodeId("a" * 32)


def cluster_of(count: int, memory: int = 8) -> tuple[World, list[Host]]:
    """So many nodes that see one another and follow a leader."""
    world = World(Random(7))
    hosts = [world.add(f"node{number}", memory * GIGABYTE) for number in range(count)]
    for host in hosts:
        host.start()
    world.run_until(2_000)
    return world, hosts


def state(host: Host) -> ClusterState:
    assert host.machine is not None
    return host.machine.state(host.world.now_ms)


def outcome(world: World, command_id: str, after_ms: int = 1_000) -> CommandOutcome:
    world.run_until(world.now_ms + after_ms)
    return world.people.answers[command_id]


# ---- from a command to a served model ----


def test_one_node_serves_a_model_soon_after_its_first_start() -> None:
    """Somebody asks at the very moment the node starts, as `covey run` does."""
    world = World(Random(7))
    [host] = [world.add("ada", 8 * GIGABYTE)]
    host.files[ModelId("small")] = 1
    host.start()
    command_id = world.people.place(host, SMALL)
    assert isinstance(outcome(world, command_id, 1_500), Accepted)
    world.run_until(4_500)
    [instance] = ready_instances(state(host), SMALL.model_id)
    assert pick(state(host), SMALL.model_id) == instance
    assert head_addresses(state(host), instance)
    assert instance_status(state(host), instance).text == "ready"


def test_every_node_sees_the_same_instance_come_up_step_by_step() -> None:
    world, hosts = cluster_of(3)
    world.people.place(hosts[0], LARGE, 3)
    seen: list[str] = []
    while world.now_ms < 12_000:
        world.run_until(world.now_ms + 20)
        for instance in state(hosts[1]).instances:
            text = instance_status(state(hosts[1]), instance).text
            seen += [text] if seen[-1:] != [text] else []
    assert "downloading 25 %" in seen
    assert any(text.startswith("loading ") and text.endswith(" of 24 layers") for text in seen)
    assert seen[-1] == "ready"
    assert [len(ready_instances(state(host), LARGE.model_id)) for host in hosts] == [1, 1, 1]


def test_an_instance_loads_until_its_engine_has_packed_the_last_layer() -> None:
    world = World(Random(7), Faults(load_ms_max=600_000))
    ada = world.add("ada", 8 * GIGABYTE)
    ada.start()
    world.run_until(2_000)
    world.people.place(ada, SMALL)
    world.run_until(8_000)
    ada.processes[0].say(LoadProgressed(SMALL.layer_count, SMALL.layer_count, 4, 4))
    world.run_until(9_000)
    [instance] = state(ada).instances
    assert instance_status(state(ada), instance).text == "loading 6 of 6 layers"


def test_what_is_not_served_says_why() -> None:
    world, [ada, _] = cluster_of(2)
    refused = pick(state(ada), SMALL.model_id)
    assert isinstance(refused, Refused)
    assert refused.status == 404
    world.people.place(ada, SMALL)
    world.run_until(world.now_ms + 400)
    refused = pick(state(ada), SMALL.model_id)
    assert isinstance(refused, Refused)
    assert refused.status == 503
    assert refused.reason.startswith("small is not ready: downloading")


def test_the_least_loaded_ready_instance_is_picked() -> None:
    world, [ada, bea] = cluster_of(2)
    world.people.place(ada, SMALL)
    world.people.place(ada, SMALL)
    world.run_until(6_000)
    first, second = sorted(ready_instances(state(ada), SMALL.model_id), key=lambda each: each.instance_id)
    assert pick(state(ada), SMALL.model_id) == first
    for host in (ada, bea):
        assert host.machine is not None
        for runner in host.machine.runners.runners.values():
            runner.requests_running = 3 if runner.instance.instance_id == first.instance_id else 1
            host.machine.runners.revision += 1
    world.run_until(7_000)
    assert pick(state(bea), SMALL.model_id) == second


def test_a_runner_on_a_node_that_is_away_is_not_ready() -> None:
    world, hosts = cluster_of(2)
    world.people.place(hosts[0], SMALL, 2)
    world.run_until(7_000)
    [instance] = state(hosts[0]).instances
    assert instance_status(state(hosts[0]), instance).phase is InstancePhase.READY
    hosts[1].crash()
    world.run_until(10_000)
    assert instance_status(state(hosts[0]), instance).text == "waiting for node1"
    assert isinstance(pick(state(hosts[0]), SMALL.model_id), Refused)


def test_an_instance_that_fits_nowhere_else_waits_for_its_node() -> None:
    world, hosts = cluster_of(2, memory=3)
    world.people.place(hosts[0], LARGE, 2)
    world.run_until(9_000)
    [placed] = state(hosts[0]).instances
    hosts[1].crash()
    world.run_until(60_000)
    seen = state(hosts[0])
    assert seen.instances == (placed,)
    lacking = instance_status(seen, placed)
    assert lacking.phase is InstancePhase.LACKING
    assert lacking.text.startswith("waiting for node1, without which it finds no room: large needs 3.2 GB on 1 node")
    assert lacking.text.endswith("Free memory, add a node, or choose a smaller model")
    hosts[1].start()
    world.run_until(80_000)
    seen = state(hosts[0])
    assert seen.instances == (placed,)
    assert instance_status(seen, placed).text == "ready"


def test_a_runner_that_is_tried_again_is_loading_and_one_that_is_not_has_failed() -> None:
    world, [ada] = cluster_of(1)
    world.people.place(ada, SMALL)
    world.run_until(6_000)
    [instance] = state(ada).instances
    texts: list[str] = []
    for _ in (*MachineSettings().runner_back_off_ms, 0):
        while not ada.processes:  # the next one fails before it serves
            world.run_until(world.now_ms + 100)
        [process] = ada.processes
        process.fail("load", "the file is cut short")
        world.run_until(world.now_ms + 900)
        status = instance_status(state(ada), instance)
        texts.append(f"{status.phase.value}: {status.text}")
    again = "loading: node0 tries again after a failure (load: the file is cut short)"
    assert texts == [again, again, again, "failed: failed: load: the file is cut short"]
    refused = pick(state(ada), SMALL.model_id)
    assert isinstance(refused, Refused)
    assert refused.reason.endswith(
        f"\n`covey place {instance.card.model_id}` tries again, and `covey stop {instance.instance_id}` gives up on it."
    )


def test_a_download_that_is_tried_again_is_going_on_and_one_that_no_other_try_cures_has_failed() -> None:
    world, [ada] = cluster_of(1)
    world.people.place(ada, SMALL)
    world.run_until(world.now_ms + 100)
    assert ada.machine is not None
    statuses: list[tuple[InstancePhase, str]] = []
    for attempt, is_final in ((1, False), (2, True)):
        ada.fetches.clear()  # of the world's own there is none
        ada.tell_machine(FetchFailed(SMALL.model_id, attempt, "the hub can't be reached", is_final), ada.boot)
        world.run_until(world.now_ms + 400)
        [instance] = state(ada).instances
        status = instance_status(state(ada), instance)
        statuses.append((status.phase, status.text))
        world.run_until(world.now_ms + MachineSettings().fetch_back_off_ms[0])
    assert statuses == [
        (InstancePhase.DOWNLOADING, "downloading 0 %; node0 tries again after a failure (the hub can't be reached)"),
        (InstancePhase.FAILED, "failed: the hub can't be reached"),
    ]


def test_a_wish_for_two_nodes_is_served_by_the_one_that_is_left() -> None:
    world, hosts = cluster_of(2)
    world.people.place(hosts[0], SMALL, 2)
    world.run_until(7_000)
    hosts[1].crash()
    world.run_until(45_000)
    [instance] = state(hosts[0]).instances
    assert [stage.node_id for stage in instance.stages] == [hosts[0].node_id]
    assert instance_status(state(hosts[0]), instance).text == "ready"


def test_a_blip_of_a_node_whose_file_is_still_coming_moves_nothing() -> None:
    """The other runner waits for it in a second generation; no link between the two has broken, since there is none."""
    world = World(Random(7), Faults(fetch_ms_max=600_000))
    ada, bea = hosts = [world.add(f"node{number}", 8 * GIGABYTE) for number in range(2)]
    ada.files[SMALL.model_id] = SMALL.file_bytes
    for host in hosts:
        host.start()
    world.run_until(2_000)
    world.people.place(ada, SMALL, 2)
    world.run_until(5_000)
    ada.processes[0].fail("connect", "the port is taken")
    world.run_until(9_000)
    assert ada.processes[0].key[1] == 2
    before, fetching = state(ada).instances, dict(bea.fetches)
    cables = {(ada.node_id, bea.node_id), (bea.node_id, ada.node_id)}
    world.network.cuts |= cables
    world.run_until(14_000)
    world.network.cuts -= cables
    world.run_until(16_000)
    assert (state(ada).instances, bea.fetches) == (before, fetching)


def test_a_lost_node_is_replaced_only_by_nodes_that_were_chosen() -> None:
    world, hosts = cluster_of(4)
    first, second, _, _ = (host.node_id for host in hosts)
    world.people.place(hosts[3], SMALL, 2, (first, second))
    world.run_until(7_000)
    hosts[1].crash()
    world.run_until(60_000)
    [instance] = state(hosts[3]).instances
    assert [stage.node_id for stage in instance.stages] == [first]
    hosts[0].crash()
    world.run_until(120_000)
    [instance] = state(hosts[3]).instances
    assert instance_status(state(hosts[3]), instance).text.startswith("waiting for node")


def test_memory_that_is_promised_but_not_loaded_counts() -> None:
    world, [ada] = cluster_of(1, memory=7)
    first, second = world.people.place(ada, LARGE), world.people.place(ada, LARGE)
    assert isinstance(outcome(world, first), Accepted)
    refused = outcome(world, second)
    assert isinstance(refused, Refused)
    assert "are missing" in refused.reason


def test_a_node_does_not_start_what_two_leaders_assigned_to_the_same_memory() -> None:
    world, [ada] = cluster_of(1, memory=7)
    world.people.place(ada, LARGE)
    world.run_until(9_000)
    assert ada.machine is not None
    [wish], [instance] = ada.machine.cluster.wishes.values(), state(ada).instances
    stages = tuple(replace(stage, runner_id=RunnerId("d1.0")) for stage in instance.stages)
    other = replace(instance, instance_id=InstanceId("d1.b-1-0"), wish_id="d1", stages=stages)
    ada.machine.cluster.apply((Written("wish/d1", replace(wish, wish_id="d1")), Written("instance/d1.b-1-0", other)))
    world.run_until(30_000)
    assert instance_status(state(ada), instance).phase is InstancePhase.READY
    status = instance_status(state(ada), other)
    assert status.phase is InstancePhase.WAITING
    assert status.text == "node0 has too little memory now: 3.0 GB free, 3.5 GB needed"
    assert len(ada.processes) == 1


# ---- commands ----


class Lone:
    """One machine, fed by hand."""

    def __init__(self) -> None:
        self.machine = Machine(ADA, 1, "ada", "1", MachineSettings(api_address=Address("127.0.0.1", 1)))
        self.now_ms = 0
        self.feed(Started())
        self.feed(HardwareProbed(World(Random(1)).add("ada", 8 * GIGABYTE).hardware()))

    def feed(self, news: object, at_ms: int | None = None) -> list[Effect]:
        """Its disk takes everything at once."""
        self.now_ms = self.now_ms if at_ms is None else at_ms
        effects = self.machine.handle(self.now_ms, news)  # type: ignore[arg-type]
        for effect in effects:
            if isinstance(effect, KeepEntries):
                effects += self.feed(EntriesKept(effect.token))
        return effects

    def until(self, until_ms: int) -> list[Effect]:
        """Follows the machine's own deadlines."""
        effects: list[Effect] = []
        while (deadline := self.machine.deadline()) is not None and deadline <= until_ms:
            assert deadline > self.now_ms
            effects += self.feed(DeadlinePassed(), deadline)
        self.now_ms = until_ms
        return effects


def answers(effects: list[Effect]) -> list[CommandOutcome]:
    return [effect.outcome for effect in effects if isinstance(effect, AnswerCommand)]


def test_a_command_waits_for_the_first_leader() -> None:
    lone = Lone()
    assert answers(lone.feed(CommandSubmitted("c", PlaceModel(card=SMALL)))) == []
    [accepted] = answers(lone.until(1_000))
    assert isinstance(accepted, Accepted)


def test_a_command_that_nobody_answers_times_out_once() -> None:
    lone = Lone()
    heartbeats = iter(range(1, 100))

    def beat() -> None:
        """A leader that hears us, and says nothing else."""
        leader = NodeId("0" * 32)
        lone.feed(MessageReceived(Heartbeat(leader, 1, next(heartbeats), (ADA,), Claim(9, leader), "")), lone.now_ms)

    beat()
    effects = lone.feed(CommandSubmitted("c", PlaceModel(card=SMALL)))
    for second in range(1, 12):
        effects += lone.until(second * 1_000)
        beat()
    assert answers(effects) == [TimedOut(10_000)]
    asked = [each for each in effects if isinstance(each, SendTo) and isinstance(each.message, CommandRequest)]
    assert 15 <= len(asked) <= 21


def test_a_request_is_answered_again_but_carried_out_once() -> None:
    lone = Lone()
    lone.until(1_000)
    request = MessageReceived(CommandRequest("c", NodeId("b" * 32), PlaceModel(card=SMALL)))
    first, again = lone.feed(request), lone.feed(request)
    outcomes = [
        each.message
        for each in [*first, *again]
        if isinstance(each, SendTo) and isinstance(each.message, CommandAnswer)
    ]
    assert len(outcomes) == 2
    assert outcomes[0] == outcomes[1]
    assert len(lone.machine.state(lone.now_ms).instances) == 1


def test_an_answer_for_somebody_else_is_dropped() -> None:
    lone = Lone()
    lone.feed(CommandSubmitted("c", PlaceModel(card=SMALL)))
    foreign = CommandAnswer("c", NodeId("b" * 32), Accepted(InstanceId("i")))
    assert answers(lone.feed(MessageReceived(foreign))) == []


def test_deleting_what_never_was_is_refused() -> None:
    lone = Lone()
    lone.until(1_000)
    [refused] = answers(lone.feed(CommandSubmitted("c", DeleteInstance(InstanceId("x.y")))))
    assert isinstance(refused, Refused)
    assert refused.status == 404


def test_too_large_a_model_is_refused_to_whoever_asked() -> None:
    world, hosts = cluster_of(2)
    for host in hosts:
        refused = outcome(world, world.people.place(host, HUGE))
        assert isinstance(refused, Refused)
        assert "GB are missing" in refused.reason


# ---- leaving, sleeping, telling ----


def test_leaving_stops_runners_first_and_answers_who_waits() -> None:
    world, [ada] = cluster_of(1)
    world.people.place(ada, SMALL)
    world.run_until(6_000)
    assert len(ada.processes) == 1
    ada.leave()
    assert ada.is_up
    command_id = world.people.place(ada, SMALL)
    assert world.people.answers[command_id] == Refused("this node is ending: ask another one.", 503)
    world.run_until(7_000)
    assert not ada.is_up
    assert ada.processes == []


def test_a_node_without_runners_leaves_at_once() -> None:
    lone = Lone()
    effects = lone.feed(LeaveRequested())
    assert effects[-1] == Left()
    assert lone.feed(DeadlinePassed()) == []
    assert lone.machine.deadline() is None


def test_after_a_sleep_a_node_does_not_lead_before_it_has_listened() -> None:
    lone = Lone()
    lone.until(5_000)
    lone.feed(CommandSubmitted("c", PlaceModel(card=SMALL)), 3_600_000)
    assert lone.machine.state(lone.now_ms).leader is None
    [accepted] = answers(lone.until(3_601_000))
    assert isinstance(accepted, Accepted)


def test_an_idle_node_says_little() -> None:
    lone = Lone()
    lone.until(20_000)
    effects = lone.until(120_000)
    published = [each.message for each in effects if isinstance(each, Publish)]
    assert len([message for message in published if isinstance(message, NodeReport)]) == 10
    assert len([message for message in published if isinstance(message, Heartbeat)]) == 200
    assert len(effects) == 210 + len([each for each in effects if isinstance(each, StateChanged)])


def test_reports_are_coalesced() -> None:
    lone = Lone()
    lone.until(5_000)
    effects: list[Effect] = []
    for number in range(100):
        effects += lone.until(5_000 + number * 10)
        effects += lone.feed(ModelsListed((ModelId(f"model {number}"),)))
    reports = [each for each in effects if isinstance(each, Publish) and isinstance(each.message, NodeReport)]
    assert 4 <= len(reports) <= 6


def test_small_changes_of_memory_are_not_reported() -> None:
    lone = Lone()
    hardware = lone.machine.memory.probed
    assert hardware is not None
    lone.until(5_000)
    little = replace(hardware, memory_bytes_available=hardware.memory_bytes_available - 50_000_000)
    much = replace(hardware, memory_bytes_available=hardware.memory_bytes_available - 500_000_000)
    assert not any(isinstance(each, Publish) for each in lone.feed(HardwareProbed(little)))
    assert any(isinstance(each, Publish) for each in lone.feed(HardwareProbed(much)))


def test_a_client_hears_of_changes_only() -> None:
    lone = Lone()
    lone.until(5_000)
    before = lone.machine.state(lone.now_ms).revision
    assert StateChanged() not in lone.feed(DeadlinePassed(), 5_001)
    assert lone.machine.state(lone.now_ms).revision == before
    assert StateChanged() in lone.feed(ModelsListed((ModelId("small"),)), 5_002)
    assert lone.machine.state(lone.now_ms).revision == before + 1


def test_a_client_hears_when_an_instance_counts_no_more_because_its_node_stayed_silent() -> None:
    lone = Lone()
    lone.feed(CommandSubmitted("c", PlaceModel(card=SMALL)))
    lone.until(2_000)
    leader, beats = NodeId("0" * 32), iter(range(1, 100))
    [instance] = lone.machine.state(lone.now_ms).instances
    stages = tuple(replace(stage, node_id=NodeId("b" * 32)) for stage in instance.stages)
    silent = replace(instance, instance_id=InstanceId("c.silent-1-1"), stages=stages)
    lone.machine.cluster.apply((Written(f"instance/{silent.instance_id}", silent),))
    listened_ms = MachineSettings().forgotten_ms
    for now_ms in (*range(2_000, listened_ms, 1_000), listened_ms - 1):
        lone.until(now_ms)
        lone.feed(MessageReceived(Heartbeat(leader, 1, next(beats), (ADA,), Claim(9, leader), "")), now_ms)
    before = lone.machine.state(lone.now_ms)
    effects = lone.until(listened_ms)
    after = lone.machine.state(lone.now_ms)
    assert (len(before.instances), len(after.instances)) == (2, 1)
    assert after.revision > before.revision
    assert StateChanged() in effects


def test_a_newcomer_is_greeted_once_whether_its_report_or_its_heartbeat_comes_first() -> None:
    """It started beside us; without a greeting it would wait 10 s for our next report, and not know our name."""
    for order in (1, -1):
        lone, newcomer = Lone(), Lone()
        newcomer.machine = Machine(NodeId("f" * 32), 1, "newcomer", "1", MachineSettings())
        newcomer.feed(Started(), 0)
        newcomer.feed(HardwareProbed(World(Random(1)).add("f", 8 * GIGABYTE).hardware()), 0)
        said = [each.message for each in newcomer.until(500) if isinstance(each, Publish)]
        first = {type(message): message for message in reversed(said)}
        lone.until(1_000)
        effects = [
            each for kind in (Heartbeat, NodeReport)[::order] for each in lone.feed(MessageReceived(first[kind]))
        ]
        greeting = [type(each.message) for each in effects if isinstance(each, SendTo)]
        assert greeting[:2] == [Heartbeat, NodeReport]
        assert greeting.count(NodeReport) == 1


def test_reports_that_say_the_same_again_are_no_change_to_a_client() -> None:
    world, hosts = cluster_of(2)
    world.run_until(5_000)
    before = [state(host).revision for host in hosts]
    world.run_until(5_000 + 3 * MachineSettings().report_idle_ms)
    assert [state(host).revision for host in hosts] == before


def test_instances_of_one_wish_by_two_leaders_are_reduced_to_one() -> None:
    """Both halves of a divided cluster placed the same command; the one that is ready stays."""
    world, hosts = cluster_of(2)
    command_id = world.people.place(hosts[0], SMALL)
    world.run_until(7_000)
    [instance] = state(hosts[0]).instances
    leader = next(host for host in hosts if host.machine and host.machine.leadership.leads)
    twin_id = InstanceId(f"{command_id}.zz-1-1")
    stages = tuple(replace(stage, runner_id=RunnerId(f"{twin_id}.0")) for stage in instance.stages)
    twin = replace(instance, instance_id=twin_id, stages=stages)
    assert leader.machine is not None
    leader.machine.cluster.apply((Written(f"instance/{twin.instance_id}", twin),))
    world.run_until(9_000)
    assert [each.instance_id for each in state(leader).instances] == [instance.instance_id]
