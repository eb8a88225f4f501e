"""Real runner processes over loopback: they answer, and whatever is done to them ends as it should."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import psutil
import pytest

from covey.engine import runner as runner_module
from covey.engine.greeting import LinkHello, LinkRefused, LinkWelcome
from covey.engine.handshake import receive_first
from covey.engine.link import LinkBrokenError
from covey.schema.generation import Admit, Broken, Cancel, Ended, FinishReason, HeadEvent, Sampling, TokenSampled
from covey.schema.ids import RequestId
from covey.schema.model import Shard
from covey.schema.runner import (
    Activity,
    Address,
    Beat,
    Configure,
    Connected,
    ConnectTo,
    Draft,
    Listening,
    Load,
    LoadProgressed,
    Parted,
    PhaseFailed,
    Ready,
    WarmUp,
)
from covey.schema.wire import FrameBuffer, pack
from tests.credentials import credentials, node
from tests.engine.harness import (
    HOST,
    Client,
    Runner,
    bring_up,
    expected_tokens,
    make_admit,
    make_spec,
    open_channel,
    pipeline,
    sampled,
    shut_down,
)

SLOW = {"step_delay_ms": "20"}
BUSY = Sampling(
    temperature=0.9, top_p=0.95, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.1, seed=42
)


def is_token(event: HeadEvent) -> bool:
    return isinstance(event, TokenSampled)


def is_end(event: HeadEvent) -> bool:
    return isinstance(event, Ended | Broken)


def answer(port: int, admit: Admit) -> list[HeadEvent]:
    with Client(port) as client:
        client.send(admit)
        return client.events_until(is_end)


def assert_serves(port: int) -> None:
    admit = make_admit("check", [1, 2, 3], 4)
    assert sampled(answer(port, admit)) == expected_tokens(admit)


def exchange(connection: socket.socket, data: bytes) -> bytes:
    """What comes back before the other side closes; it may do so without reading everything."""
    try:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(100)
    except OSError:
        return b""


@pytest.fixture(scope="module")
def alone() -> Iterator[tuple[Runner, int]]:
    with pipeline(1, engine_options=SLOW, vocabulary_size=256) as (runners, port):
        yield runners[0], port


@pytest.mark.parametrize("stage_count", [1, 2, 3])
def test_any_number_of_stages_gives_the_same_answers(stage_count: int) -> None:
    """Six requests at once on four slots, over two connections: with short and long prompts, greedy and not."""
    admits = [
        make_admit(
            f"r{number}",
            [(37 * number + place * place) % 256 for place in range(5 + 170 * number)],
            25,
            sampling=BUSY if number % 2 else Sampling(temperature=0),
            stop_token_ids=tuple(range(6)),
        )
        for number in range(6)
    ]
    with pipeline(stage_count) as (runners, port):
        with Client(port) as first, Client(port) as second:
            first.send(*admits[:3])
            second.send(*admits[3:])
            events = first.events_of_all(["r0", "r1", "r2"]) | second.events_of_all(["r3", "r4", "r5"])
        for admit in admits:
            assert sampled(events[admit.request_id]) == expected_tokens(admit)
        head, *others = shut_down(runners)
        assert head == 0
        assert set(others) <= {0, 1}


def test_a_resumed_request_goes_on_as_it_would_have(alone: tuple[Runner, int]) -> None:
    admit = make_admit("r", [1, 2, 3, 4], 12, sampling=BUSY)
    whole = sampled(answer(alone[1], admit))
    resumed = msgspec.structs.replace(admit, attempt=1, token_ids=(*admit.token_ids, *whole[:5]))
    events = answer(alone[1], resumed)
    assert sampled(events) == whole[5:]
    assert isinstance(events[-1], Ended)
    assert events[-1].completion_tokens == 12


def test_what_cannot_run_is_refused_and_the_rest_goes_on(alone: tuple[Runner, int]) -> None:
    for admit, status in ((make_admit("long", [1] * 5000), 400), (make_admit("odd", [300]), 400)):
        (event,) = answer(alone[1], admit)
        assert isinstance(event, Broken)
        assert event.status == status
    assert_serves(alone[1])


@pytest.mark.timed
def test_a_cancelled_request_ends_within_a_step(alone: tuple[Runner, int]) -> None:
    with Client(alone[1]) as client:
        client.send(make_admit("r", [1, 2], 1000), make_admit("other", [3, 4], 30))
        client.events_until(lambda event: is_token(event) and event.request_id == "r")
        started = time.monotonic()
        client.send(Cancel(RequestId("r"), 0))
        events = client.events_until(lambda event: is_end(event) and event.request_id == "r")
        assert time.monotonic() - started < 0.5
        assert isinstance(events[-1], Ended)
        assert events[-1].reason is FinishReason.CANCELLED
        rest = client.events_until(is_end)
        assert {event.request_id for event in rest} == {"other"}


def test_a_closed_connection_cancels_its_requests(alone: tuple[Runner, int]) -> None:
    runner, port = alone
    with Client(port) as client:
        client.send(*(make_admit(f"r{number}", [number], 1900) for number in range(6)))
        client.events_until(is_token)
    deadline = time.monotonic() + 5
    while (runner.wait(Activity).running, runner.seen[-1]) != (0, Activity(0, 0)):
        assert time.monotonic() < deadline
    assert_serves(port)


def test_activity_tells_busy_and_idle(alone: tuple[Runner, int]) -> None:
    runner, port = alone
    runner.seen.clear()
    answer(port, make_admit("r", [1], 60))
    told = [runner.wait(Activity)]
    while told[-1].running:
        told.append(runner.wait(Activity))
    assert told[0] == Activity(1, 0)
    assert told[-1] == Activity(0, 0)


def test_it_beats_while_it_waits_and_while_it_computes() -> None:
    """So the node tells a process that was stopped, or hangs in a step, from one that is slow or has nothing to do."""
    with pipeline(2, engine_options={"step_delay_ms": "3000"}) as (runners, port), Client(port) as client:
        assert [runner.wait(Beat) for runner in runners] == [Beat(0, is_busy=False)] * 2
        client.send(make_admit("r", [1], 3))
        seen = [[runner.wait(Beat) for _ in range(4)] for runner in runners]
        for beats in seen:
            assert any(beat.is_busy for beat in beats)
            assert 0 < beats[-1].steps <= 3
            assert [beat.steps for beat in beats] == sorted(beat.steps for beat in beats)


@pytest.mark.parametrize(
    "junk",
    [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, b"\x04\x00\x00\x00junk", b"\x00\x00\x00\x00", b"\x10"],
    ids=["http", "huge", "junk", "empty", "cut"],
)
def test_garbage_on_the_data_port_harms_nobody(alone: tuple[Runner, int], junk: bytes) -> None:
    with Client(alone[1]) as client:
        client.send(make_admit("r", [1, 2], 20))
        with socket.create_connection((HOST, alone[1]), 10) as stranger:
            assert exchange(stranger, junk) == b""
        assert len(sampled(client.events_until(is_end))) == 20


def test_garbage_after_the_hello_costs_only_its_own_requests(alone: tuple[Runner, int]) -> None:
    with Client(alone[1]) as good, Client(alone[1]) as bad:
        good.send(make_admit("r", [1, 2], 20))
        bad.send(make_admit("r", [1, 2], 1000))
        bad.events_until(is_token)
        bad.socket.sendall(b"\x05\x00\x00\x00\xc1\xc1\xc1\xc1\xc1")
        while bad.next_event() is not None:
            pass
        assert len(sampled(good.events_until(is_end))) == 20


def test_a_connection_for_another_instance_is_closed(alone: tuple[Runner, int]) -> None:
    with Client(alone[1], "instance-2") as client:
        assert client.next_event() is None


def test_strangers_cannot_link(alone: tuple[Runner, int]) -> None:
    channel = open_channel(alone[1])
    channel.send(pack(LinkHello("instance-1", 0, 0, 1)))
    answer_ = msgspec.msgpack.decode(receive_first(channel, time.monotonic() + 10), type=LinkWelcome | LinkRefused)
    channel.socket.close()
    assert isinstance(answer_, LinkRefused)
    assert_serves(alone[1])


def test_an_idle_runner_uses_no_processor(alone: tuple[Runner, int]) -> None:
    assert_serves(alone[1])
    process = psutil.Process(alone[0].process.pid)
    time.sleep(0.1)
    before = sum(process.cpu_times()[:2])
    time.sleep(1.0)
    assert sum(process.cpu_times()[:2]) - before <= 0.02


def test_ctrl_c_is_the_nodes_affair(alone: tuple[Runner, int]) -> None:
    alone[0].process.send_signal(signal.SIGINT)
    assert_serves(alone[1])


@pytest.mark.timed
def test_the_end_of_standard_input_ends_a_computing_runner() -> None:
    with pipeline(1, engine_options={"step_delay_ms": "30000"}) as (runners, port), Client(port) as client:
        client.send(make_admit("r", [1]))
        assert runners[0].wait(Activity) == Activity(1, 0)
        assert runners[0].process.stdin is not None
        started = time.monotonic()
        runners[0].process.stdin.close()
        assert runners[0].wait_end() == 1
        assert time.monotonic() - started < 1


def test_the_end_of_standard_input_ends_a_connecting_runner() -> None:
    runner = Runner(make_spec(0, 2))
    with socket.create_server((HOST, 0)) as silent:
        runner.wait(Listening)
        runner.tell(ConnectTo((Address(HOST, silent.getsockname()[1]),)))
        silent.accept()[0].close()
        assert runner.process.stdin is not None
        runner.process.stdin.close()
        assert runner.wait_end(1) == 1
    runner.close()


@pytest.mark.timed
@pytest.mark.parametrize("victim", [1, 2])
def test_a_killed_stage_breaks_its_requests_at_once(victim: int) -> None:
    with pipeline(3, engine_options=SLOW) as (runners, port), Client(port) as client:
        client.send(make_admit("r", [1, 2], 1000), make_admit("s", [3], 1000))
        client.events_until(is_token)
        started = time.monotonic()
        runners[victim].process.kill()
        events = client.events_of_all(["r", "s"])
        assert time.monotonic() - started < 2
        for name in ("r", "s"):
            last = events[name][-1]
            assert isinstance(last, Broken)
            assert last.status == 503
        assert client.next_event() is None
        survivors = [runner for runner in runners if runner is not runners[victim]]
        assert all("The link to stage" in runner.wait(Parted).reason for runner in survivors)


def begin_anew(runners: Sequence[Runner], generation: int = 1, **changes: object) -> int:
    """Brings processes that live together in another generation; returns the head's port."""
    for index, runner in enumerate(runners):
        runner.tell(Configure(make_spec(index, len(runners), generation=generation, **changes), credentials(index)))
    return bring_up(runners)[0]


@pytest.mark.parametrize("victim", [1, 2])
def test_survivors_answer_with_one_that_takes_the_place_of_a_killed_one(victim: int) -> None:
    with pipeline(3, engine_options=SLOW) as (runners, port), Client(port) as client:
        client.send(make_admit("r", [1, 2], 1000))
        client.events_until(is_token)
        runners[victim].process.kill()
        [runner.wait(Parted) for runner in runners if runner is not runners[victim]]
        old, runners[victim] = runners[victim], Runner(make_spec(victim, 3, generation=1))
        old.close()
        runners[victim].wait(Listening)
        assert_serves(begin_anew(runners))
        assert [runner.process.poll() for runner in runners] == [None] * 3


@pytest.mark.timed
def test_the_stage_before_one_that_stands_still_parts_with_it_within_seconds() -> None:
    with pipeline(3, engine_options=SLOW) as (runners, port), Client(port) as client:
        client.send(make_admit("r", [1, 2], 1000))
        client.events_until(is_token)
        started = time.monotonic()
        runners[1].process.send_signal(signal.SIGSTOP)
        assert "gave no sign of life for 5 s" in runners[0].wait(Parted).reason
        assert isinstance(client.events_until(is_end)[-1], Broken)
        assert time.monotonic() - started < 8
        assert_serves(begin_anew([runners[0]]))


def test_a_survivor_takes_on_the_layers_of_the_others() -> None:
    with pipeline(3, engine_options={"load_delay_ms": "10"}) as (runners, _):
        for runner in runners[1:]:
            runner.process.kill()
        runners[0].wait(Parted)
        runners[0].seen.clear()
        assert_serves(begin_anew(runners[:1]))
        told = [message for message in runners[0].seen if isinstance(message, LoadProgressed)]
        assert told[-1].layers_loaded == told[-1].layers_total == 6


def test_a_new_generation_needs_no_loss_and_breaks_what_is_under_way() -> None:
    with pipeline(2, engine_options=SLOW) as (runners, port), Client(port) as client:
        client.send(make_admit("r", [1], 1000))
        client.events_until(is_token)
        new_port = begin_anew(runners)
        last = client.events_until(is_end)[-1]
        assert isinstance(last, Broken)
        assert client.next_event() is None
        assert_serves(new_port)


@pytest.mark.timed
def test_a_stage_that_waits_for_its_neighbour_begins_anew_at_once() -> None:
    """It may have been told of one that is gone by now."""
    runners = [Runner(make_spec(0, 2)), Runner(make_spec(1, 2))]
    try:
        [runner.wait(Listening) for runner in runners]
        with socket.create_server((HOST, 0)) as silent:
            runners[0].tell(ConnectTo((Address(HOST, silent.getsockname()[1]),)))
            silent.accept()[0].close()
            started = time.monotonic()
            assert_serves(begin_anew(runners))
        assert time.monotonic() - started < 4
    finally:
        [runner.close() for runner in runners]


def test_generations_leave_nothing_behind() -> None:
    """Also where they end while requests are under way."""
    with pipeline(2, engine_options=SLOW) as (runners, _), ExitStack() as guests:
        processes = [psutil.Process(runner.process.pid) for runner in runners]
        counts = []
        for generation in range(1, 13):
            port = begin_anew(runners, generation, engine_options=SLOW)
            for number in range(3):
                guests.enter_context(Client(port)).send(make_admit(f"r{number}", [1], 1000))
            counts.append([(each.num_fds(), each.num_threads()) for each in processes])
        assert_serves(port)
        guests.close()
        deadline = time.monotonic() + 10  # in which threads that offered a link look again
        while [(each.num_fds(), each.num_threads()) for each in processes] > counts[1] and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [(each.num_fds(), each.num_threads()) for each in processes] <= counts[1]


def wait_failure(runner: Runner) -> PhaseFailed:
    while True:
        if found := [message for message in runner.messages if isinstance(message, PhaseFailed)]:
            return found[0]
        runner._read(time.monotonic() + 10)


def test_a_terminated_head_tells_its_clients() -> None:
    with pipeline(1, engine_options=SLOW) as (runners, port), Client(port) as client:
        client.send(make_admit("r", [1], 1000))
        client.events_until(is_token)
        runners[0].process.send_signal(signal.SIGTERM)
        last = client.events_until(is_end)[-1]
        assert isinstance(last, Broken)
        assert (last.status, runners[0].wait_end()) == (503, 0)
        assert last.message == "The node is being stopped, or its part of the model is."
        assert "Traceback" not in runners[0].close()


@pytest.mark.timed
def test_a_shut_down_need_not_wait_for_a_phase() -> None:
    runner = Runner(make_spec(engine_options={"load_delay_ms": "30000"}))
    runner.tell(ConnectTo((Address(HOST, 1),)))
    runner.tell(Load())
    runner.wait(Connected)
    started = time.monotonic()
    assert shut_down([runner]) == [0]
    assert time.monotonic() - started < 2
    runner.close()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gone.gguf", "is gone; put it back, then place the model again"),
        ("file/model.gguf", "can't be read (Not a directory); see to that, then place the model again"),
    ],
)
def test_a_model_file_that_cannot_be_read_is_told_in_a_sentence(tmp_path: Path, name: str, told: str) -> None:
    """It was there when the model was placed; a person deleted it since, and then the runner was killed."""
    (tmp_path / "file").touch()
    runner = Runner(make_spec(engine="onnx", model_path=str(tmp_path / name)))
    runner.tell(ConnectTo((Address(HOST, 1),)))
    runner.tell(Load())
    assert wait_failure(runner) == PhaseFailed("loading", f"the model file {tmp_path / name} {told}")
    assert runner.wait_end() == 1
    assert "Traceback" not in runner.close()


def test_an_engine_that_cannot_load_is_told_in_a_sentence() -> None:
    runner = Runner(make_spec(engine="abacus"))
    runner.tell(ConnectTo((Address(HOST, 1),)))
    runner.tell(Load())
    failure = wait_failure(runner)
    assert failure == PhaseFailed("loading", "There is no engine called abacus; choose onnx or fake.")
    assert runner.wait_end() == 1
    runner.close()


def test_a_command_out_of_turn_is_refused() -> None:
    runner = Runner(make_spec())
    runner.tell(WarmUp())
    assert "WarmUp where ConnectTo was due" in wait_failure(runner).reason
    assert runner.wait_end() == 1
    runner.close()


def test_a_port_that_cannot_be_opened_is_told() -> None:
    runner = Runner(make_spec(listen_host="192.0.2.1"))  # an address of nobody (RFC 5737)
    failure = wait_failure(runner)
    assert failure.phase == "configuring"
    assert runner.wait_end() == 1
    runner.close()


def test_stages_in_the_wrong_order_refuse_one_another() -> None:
    """Three stages, of which the head was told the last one's address as its next."""
    mine = node(0).node_id
    runners = [Runner(make_spec(index, 3, stage_node_ids=(mine,) * 3), credentials(0)) for index in range(3)]
    ports = [runner.wait(Listening).port for runner in runners]
    runners[0].tell(ConnectTo((Address(HOST, ports[2]),)))
    failure = wait_failure(runners[0])
    assert failure.phase == "connecting"
    assert "stage 2 of 3 follows stage 1, not stage 0 of 3" in failure.reason
    for runner in runners:
        runner.close()


def test_requests_are_taken_by_a_ready_head_only() -> None:
    runners = [Runner(make_spec(index, 2)) for index in range(2)]
    try:
        with Client(runners[0].wait(Listening).port) as early:
            assert early.next_event() is None
        runners[0].messages.insert(0, runners[0].seen[0])
        ports = bring_up(runners)
        with Client(ports[1]) as wrong:
            assert wrong.next_event() is None
        assert_serves(ports[0])
    finally:
        for runner in runners:
            runner.close()


def test_a_library_that_prints_does_not_corrupt_the_line() -> None:
    program = (
        "import os, sys\n"
        "from covey.engine.pipe import NodePipe\n"
        "from covey.schema.runner import Ready\n"
        "pipe = NodePipe()\n"
        "print('from Python', flush=True)\n"
        "os.write(1, b'from a library')\n"
        "assert sys.stdin.read() == ''\n"
        "pipe.tell(Ready())\n"
    )
    result = subprocess.run([sys.executable, "-c", program], input=b"commands", capture_output=True, check=True)
    assert FrameBuffer().feed(result.stdout) == [pack(Ready())[4:]]
    assert b"from Python" in result.stderr
    assert b"from a library" in result.stderr


def test_many_requests_come_and_go(alone: tuple[Runner, int]) -> None:
    """Eight clients at once; every second request is cancelled or its connection closed while it runs."""
    failures: list[str] = []

    def work(number: int) -> None:
        for turn in range(3):
            admit = make_admit(f"r{number}-{turn}", [number, turn, 5], 12)
            with Client(alone[1]) as client:
                client.send(admit)
                if (number + turn) % 2:
                    client.events_until(is_token)
                elif sampled(client.events_until(is_end)) != expected_tokens(admit):
                    failures.append(admit.request_id)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)
    assert_serves(alone[1])


def test_what_breaks_while_the_node_ends_it_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its neighbour was stopped first, and the broken link is noticed just before the signal."""
    told: list[object] = []

    class Pipe:
        is_ending = False
        tell = told.append

    def live(_: object) -> None:
        raise LinkBrokenError("the stage before has gone")

    monkeypatch.setattr(runner_module, "NodePipe", Pipe)
    monkeypatch.setattr(runner_module.Runner, "live", live)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert runner_module.main() == 1
    assert told == [PhaseFailed("configuring", "the stage before has gone")]
    Pipe.is_ending = True
    assert runner_module.main() == 0
    assert len(told) == 1


def test_a_stage_without_weights_that_is_late_tries_again_and_does_not_fail() -> None:
    """Its neighbour is in the next generation already; its own node will tell it so in a moment."""
    runners = [Runner(make_spec(0, 2)), Runner(make_spec(1, 2, generation=1))]
    try:
        ports = [runner.wait(Listening).port for runner in runners]
        runners[0].tell(ConnectTo((Address(HOST, ports[1]),)))
        time.sleep(0.5)
        assert runners[0].process.poll() is None
        assert_serves(begin_anew(runners, 2))
    finally:
        [runner.close() for runner in runners]


def test_a_stage_lives_for_the_one_before_it_from_its_first_link_on() -> None:
    """Its own node may hear seconds later that all stages listen."""
    runners = [Runner(make_spec(index, 2)) for index in range(2)]
    try:
        ports = [runner.wait(Listening).port for runner in runners]
        runners[0].tell(ConnectTo((Address(HOST, ports[1]),)))
        time.sleep(7)
        runners[1].tell(ConnectTo((Address(HOST, ports[0]),)))
        for runner in runners:
            runner.wait(Connected)
        time.sleep(1)
        assert [runner.process.poll() for runner in runners] == [None, None]
    finally:
        [runner.close() for runner in runners]


# ---- with a draft model ----


def bring_up_drafted(stage_count: int, layers: int, **changes: object) -> tuple[list[Runner], int]:
    """Ready runners, of which the head has a draft of so many layers, and its port."""
    head = {"draft": Draft(model_path="", layer_count=layers), "vocabulary_size": 256}
    specs = [make_spec(index, stage_count, **{**changes, **({} if index else head)}) for index in range(stage_count)]
    runners = [Runner(spec) for spec in specs]
    return runners, bring_up(runners)[0]


def steps_after(head: Runner, admits: Sequence[Admit], port: int) -> int:
    """How many the head has counted once these were answered, each as without a draft, one after another."""
    for admit in admits:
        assert sampled(answer(port, admit)) == expected_tokens(admit)
    while True:  # those of a while ago were not read yet
        waits_from = time.monotonic()
        beat = head.wait(Beat)
        if time.monotonic() - waits_from > 0.2:
            return beat.steps


@pytest.mark.parametrize("stage_count", [1, 2])
def test_with_a_draft_the_same_answers_take_fewer_steps(stage_count: int) -> None:
    """The draft takes no time beside these steps. One with other layers is nearly always wrong."""
    admits = [make_admit("greedy", range(200), 60), make_admit("drawn", [5, 6, 7], 40, sampling=BUSY)]
    counts = []
    for layers in (6, 5):
        runners, port = bring_up_drafted(stage_count, layers, engine_options={**SLOW, "lookup": "0"})
        try:
            counts.append(steps_after(runners[0], admits, port))
        finally:
            [runner.close() for runner in runners]
    right, wrong = counts
    assert right < 75
    assert 95 <= wrong <= 102


def test_many_requests_are_answered_beside_a_draft() -> None:
    runners, port = bring_up_drafted(2, 6)
    try:
        with Client(port) as client:
            admits = [make_admit(f"r{number}", [number, 9, 5], 5 + 20 * number) for number in range(6)]
            client.send(*admits)
            events = client.events_of_all([admit.request_id for admit in admits])
        for admit in admits:
            assert sampled(events[admit.request_id]) == expected_tokens(admit)
    finally:
        [runner.close() for runner in runners]


def test_a_draft_comes_and_goes_with_generations() -> None:
    """Its progress is told in bytes: the layers are those of the stage."""
    draft = Draft(model_path="", layer_count=40)
    with pipeline(1, draft=draft) as (runners, port):
        assert_serves(port)
        told = [(each.layers_loaded, each.layers_total) for each in runners[0].seen if isinstance(each, LoadProgressed)]
        assert told == [(layer, 6) for layer in range(1, 7)] + [(6, 6)] * 40
        for generation, wanted in enumerate((draft, None, draft), start=1):
            assert_serves(begin_anew(runners, generation, draft=wanted))


def test_a_draft_that_cannot_be_read_is_told_in_a_sentence(demo_model: Path, tmp_path: Path) -> None:
    draft = Draft(model_path=str(tmp_path / "gone.gguf"), layer_count=30)
    layers = Shard(0, 1, 30)
    spec = make_spec(0, 2, engine="onnx", model_path=str(demo_model), shard=layers, context_length=64, draft=draft)
    runners = [Runner(spec), Runner(make_spec(1, 2))]
    try:
        ports = [runner.wait(Listening).port for runner in runners]
        for place, runner in enumerate(runners):
            runner.tell(ConnectTo((Address(HOST, ports[1 - place]),)))
        runners[0].wait(Connected)
        runners[0].tell(Load())
        failure = wait_failure(runners[0])
        assert failure.phase == "loading"
        assert failure.reason.startswith("the draft model gone.gguf: the model file ")
        assert failure.reason.endswith("is gone; put it back, then place the model again")
        read = [each for each in runners[0].messages if isinstance(each, LoadProgressed)]
        assert read == [], "the model is not read in vain"
    finally:
        [runner.close() for runner in runners]
