"""A request goes to a head over a real socket and comes back as text; whoever leaves early leaves nothing running."""

import asyncio
import math
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.checkpoints.checkpoint import Checkpoint
from covey.schema.cluster import ClusterState, Instance, Member
from covey.schema.generation import (
    Admit,
    Broken,
    ChatMessage,
    Constraint,
    ConstraintKind,
    Ended,
    FinishReason,
    GenerationFailed,
    GenerationFinished,
    GenerationStarted,
    HeadEvent,
    Likelihood,
    LikelyToken,
    PrefillProgressed,
    Queued,
    QueueProgressed,
    Sampling,
    TextGenerated,
    TokenSampled,
    Usage,
)
from covey.schema.ids import InstanceId, NodeId, RunnerId
from covey.schema.model import KvCacheType, Quantizing
from covey.schema.runner import Address, RunnerState
from covey.serving import choosing as choosing_module
from covey.serving import head as head_module
from covey.serving import serving as serving_module
from covey.serving.head import HeadLostError, HeadPlace, Heads
from covey.serving.model_text import ModelTexts
from covey.serving.serving import Serving
from tests.api.fake_backend import CARD, cluster
from tests.credentials import credentials
from tests.serving.fake_head import TIMINGS, FakeHead, answer
from tests.serving.one_node import (
    READY,
    Letters,
    Node,
    all_of,
    at,
    away,
    ids_of,
    lacking,
    request,
    rest_of,
    says,
    text_of,
    told,
    until,
)

Story = Callable[[FakeHead, Node, Serving], Awaitable[None]]


def with_head(head: FakeHead, story: Story) -> None:
    async def run() -> None:
        async with head.listening():
            node = Node(head.address, READY, READY)
            async with node.serving() as serving:
                await story(head, node, serving)

    told(run)


# ---- the way it should go ----


def test_an_answer_from_the_first_event_to_the_last() -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        events = await all_of(serving, request(seed=9, token_count_max=50))
        started, prefilled, *texts, finished = events
        assert started == GenerationStarted(head.admits[0].request_id, 2, 9)
        assert prefilled == PrefillProgressed(2, 2)
        assert all(isinstance(event, TextGenerated) for event in texts)
        assert text_of(events) == "Grüße 🐦"
        assert ids_of(events) == "Grüße 🐦".encode()
        assert finished == GenerationFinished(FinishReason.STOP, Usage(2, 13), TIMINGS)
        assert head.hellos[0].instance_id == "inst-1"
        admit = head.admits[0]
        assert (admit.attempt, admit.token_ids, admit.prompt_length) == (1, (72, 105), 2)
        assert (admit.sampling.seed, admit.token_count_max, admit.stop_token_ids) == (9, 50, (0, 3))
        assert head.cancels == []

    with_head(FakeHead(says("Grüße 🐦")), story)


def test_each_request_gets_a_seed_of_its_own_and_all_share_a_connection_and_a_tokenizer() -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        answers = await asyncio.gather(*(all_of(serving, request(f"Hi {number}")) for number in range(10)))
        assert {text_of(events) for events in answers} == {"Hello"}
        assert len({admit.sampling.seed for admit in head.admits}) == 10
        assert len({admit.request_id for admit in head.admits}) == 10
        assert head.connections == 1
        assert node.loads == 1

    with_head(FakeHead(says("Hello")), story)


def test_without_a_limit_the_answer_may_fill_the_context_and_never_more() -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        await all_of(serving, request("x" * 1000))
        await all_of(serving, request("x" * 1000, token_count_max=500))
        assert [admit.token_count_max for admit in head.admits] == [24, 24]

    with_head(FakeHead(says("Hello")), story)


def test_the_answer_tells_how_much_of_its_prompt_was_cached() -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        for stop in ((), ("END",)):  # with a stop string the end is ours to tell, not the head's
            finished = (await all_of(serving, request("12345", stop=stop)))[-1]
            assert isinstance(finished, GenerationFinished)
            assert finished.usage.cached_tokens == 4

    with_head(FakeHead(lambda admit: answer(admit, b"one END", cached_tokens=4)), story)


def test_a_model_that_may_not_end_its_turn_has_its_stop_tokens_banned() -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        await all_of(serving, request())
        await all_of(serving, request(without_end=True))
        assert [admit.sampling.logit_bias for admit in head.admits] == [{}, {0: -math.inf, 3: -math.inf}]

    with_head(FakeHead(says("Hey")), story)


def test_a_stop_string_ends_the_answer_and_the_request_at_the_head() -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        events = await all_of(serving, request(stop=("END", "never")))
        assert text_of(events) == "one two "
        assert ids_of(events) == b"one two END"
        assert isinstance(events[-1], GenerationFinished)
        assert events[-1].reason is FinishReason.STOP
        assert events[-1].usage == Usage(2, 11)
        await until(lambda: head.cancels)
        assert head.cancels[0].request_id == head.admits[0].request_id

    with_head(FakeHead(says("one two END three")), story)


def test_what_only_looked_like_a_stop_string_is_shown_in_the_end() -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        assert text_of(await all_of(serving, request(stop=("END",)))) == "the EN"

    with_head(FakeHead(says("the EN")), story)


# ---- constraints, bias, log probabilities ----


def likely(text: str) -> Callable[[Admit], list[HeadEvent]]:
    """Each token comes with the log probability of its place in the answer, and the end as the next likely one."""

    def say(admit: Admit) -> list[HeadEvent]:
        events = rest_of(text)(admit)
        return [
            msgspec.structs.replace(event, likelihood=Likelihood(admit.prompt_length - event.position, ((0, -99.0),)))
            if isinstance(event, TokenSampled)
            else event
            for event in events
        ]

    return say


@pytest.mark.parametrize("hang_up_after", [None, 5])
def test_log_probabilities_stay_with_their_tokens(hang_up_after: int | None) -> None:
    """Where text waits for a character, may begin a stop string, or goes on at another attempt: none is lost."""

    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        task = asyncio.create_task(all_of(serving, request(stop=("END",), sampling=Sampling(top_logprobs=1))))
        await until(lambda: head.admits)
        head.hang_up_after = None
        told = [event for event in await task if isinstance(event, TextGenerated)]
        assert "".join(event.text for event in told) == "a 🐦 EN "
        assert all([each.token_id for each in event.picked] == list(event.token_ids) for event in told)
        picked = [each for event in told for each in event.picked]
        assert bytes(byte for each in picked for byte in each.text_bytes) == "a 🐦 EN END".encode()
        assert [each.logprob for each in picked] == [-place for place in range(len(picked))]
        assert {each.likeliest for each in picked} == {(LikelyToken(0, "<end>", (0,), -99.0),)}

    with_head(FakeHead(likely("a 🐦 EN END more"), hang_up_after=hang_up_after), story)


@pytest.mark.parametrize(
    ("sampling", "param", "part"),
    [
        (Sampling(constraint=Constraint(ConstraintKind.JSON_SCHEMA, '{"not":{}}', "a.b")), "a.b", '"not"'),
        (Sampling(logit_bias={5: 1.0, CARD.vocabulary_size: 1.0}), "logit_bias", "token 300; the ids of Tiny-Chat end"),
    ],
)
def test_what_can_not_be_followed_is_refused_before_anything_runs(sampling: Sampling, param: str, part: str) -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        [failed] = await all_of(serving, request(sampling=sampling))
        assert isinstance(failed, GenerationFailed)
        assert (failed.status, failed.param) == (400, param)
        assert part in failed.message
        assert head.admits == []
        good = Sampling(constraint=Constraint(ConstraintKind.REGEX, "a+", "x"), logit_bias={299: 1.0})
        assert text_of(await all_of(serving, request(sampling=good, seed=1))) == "Hello"
        assert head.admits[0].sampling == msgspec.structs.replace(good, seed=1)

    with_head(FakeHead(says("Hello")), story)


# ---- leaving ----


def test_leaving_early_cancels_at_the_head() -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        async with aclosing(serving.generate(request())) as events:
            async for event in events:
                if isinstance(event, TextGenerated):
                    break
        await until(lambda: head.cancels)
        assert head.cancels[0].request_id == head.admits[0].request_id
        assert head.cancels[0].attempt == head.admits[0].attempt

    with_head(FakeHead(lambda admit: answer(admit, b"Hello")[:3]), story)


def test_a_cancelled_task_cancels_at_the_head() -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        task = asyncio.create_task(all_of(serving, request()))
        await until(lambda: head.admits)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: head.cancels)

    with_head(FakeHead(lambda _: []), story)


# ---- being alive ----


def test_a_head_is_told_that_this_node_is_alive_as_often_as_it_asks() -> None:
    """Also while the client that is being answered reads nothing, and while prompts are worked on."""

    class Slow(Letters):
        def prompt_ids(self, messages: Sequence[ChatMessage]) -> list[int]:
            end = time.monotonic() + 0.3  # of computing, which holds the interpreter
            while time.monotonic() < end and len(messages[0].content) > 10:
                pass
            return super().prompt_ids(messages)

    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        async with aclosing(serving.generate(request())) as events:
            await anext(events)
            before = head.proofs
            await asyncio.sleep(0.3)
            assert head.proofs - before >= 10
            before = head.proofs
            assert text_of(await all_of(serving, request("a long prompt"))) == "Hello"
            assert head.proofs - before >= 5

    async def run() -> None:
        async with FakeHead(says("Hello"), wants_proof_ms=15).listening() as head:
            node = Node(head.address, READY, READY)
            node.load = lambda _: Slow()
            async with node.serving() as serving:
                await story(head, node, serving)

    told(run)


def test_a_head_of_an_older_version_is_told_nothing_that_it_does_not_know() -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        assert text_of(await all_of(serving, request())) == "Hello"
        await asyncio.sleep(0.1)
        assert (head.hellos[0].can_prove_alive, head.proofs) == (True, 0)

    with_head(FakeHead(says("Hello")), story)


def test_an_attempt_that_the_head_ended_while_this_node_slept_is_followed_by_the_next() -> None:
    """Some tokens had come before; then the head heard nothing, and closed the connection."""

    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        task = asyncio.create_task(all_of(serving, request()))
        await until(lambda: head.admits)
        head.hang_up_after = None
        assert text_of(await task) == "Hello"
        assert [admit.attempt for admit in head.admits] == [1, 2]
        before = head.proofs
        await until(lambda: head.proofs > before)  # on the new connection

    with_head(FakeHead(rest_of("Hello"), hang_up_after=3, wants_proof_ms=10), story)


# ---- what can go wrong ----


def test_an_answer_goes_on_where_its_connection_was_lost() -> None:
    """Four tokens of it had come, the last of them in the middle of a character."""

    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        task = asyncio.create_task(all_of(serving, request(seed=9, token_count_max=50)))
        await until(lambda: head.admits)
        head.hang_up_after = None
        events = await task
        first, second = head.admits
        assert second == msgspec.structs.replace(first, attempt=2, token_ids=(*b"Hi", *"Grüße".encode()[:3]))
        assert text_of(events) == "Grüße"
        assert ids_of(events) == "Grüße".encode()
        assert [type(event) for event in events].count(GenerationStarted) == 1
        assert isinstance(events[-1], GenerationFinished)
        assert events[-1].usage == Usage(2, 8)
        assert head.connections == 2

    with_head(FakeHead(rest_of("Grüße"), hang_up_after=4), story)


@given(st.lists(st.integers(0, 8), max_size=4), st.sampled_from(["", "END", "🐦"]))
def test_however_often_it_breaks_the_answer_is_the_same(breaks: list[int], stop: str) -> None:
    whole = "Der 🐦 sang. END Amen"

    def say(admit: Admit) -> list[HeadEvent]:
        events = rest_of(whole)(admit)
        if len(head.admits) > len(breaks):
            return events
        broken = Broken(admit.request_id, admit.attempt, "A part of the model was lost.", 503)
        return [*events[: 1 + breaks[len(head.admits) - 1]], broken]

    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        events = await all_of(serving, request(stop=(stop,) if stop else ()))
        assert text_of(events) == (whole.partition(stop)[0] if stop else whole)
        assert whole.encode().startswith(ids_of(events))
        assert isinstance(events[-1], GenerationFinished)
        assert [admit.attempt for admit in head.admits] == [*range(1, len(head.admits) + 1)]

    head = FakeHead(say)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving_module, "SPACING_S", 0.0)
        patch.setattr(serving_module, "TRIES_MAX", 5)  # more than it breaks: hardly a token comes between
        with_head(head, story)


def test_a_head_that_fell_silent_is_left_when_its_machine_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was stopped, or its cable was pulled: nothing closes the connection."""
    monkeypatch.setattr(serving_module, "SILENCE_S", 0.05)
    monkeypatch.setattr(serving_module, "LOST_S", 0.2)

    async def run() -> None:
        silent, other = FakeHead(lambda admit: rest_of("Hello")(admit)[:3]), FakeHead(rest_of("Hello"))
        async with silent.listening(), other.listening():
            node = Node(silent.address, READY, READY)
            async with node.serving() as serving:
                task = asyncio.create_task(all_of(serving, request()))
                await until(lambda: silent.admits)
                await asyncio.sleep(0.2)
                assert not task.done(), "as long as the cluster sees it, it may be computing"
                node.state = away(node.state)
                await until(lambda: silent.cancels)
                assert not task.done()
                node.state = at(cluster(READY, READY, revision=9), other.address)
                assert text_of(await task) == "Hello"
                assert other.admits[0].token_ids == (*b"Hi", *b"He")

    told(run)


def test_an_answer_that_waits_outlives_moments_in_which_its_node_is_unheard(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands in a queue, or its prompt is long; it would lose its place, or what was computed."""
    monkeypatch.setattr(serving_module, "SILENCE_S", 0.02)

    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        task, good = asyncio.create_task(all_of(serving, request())), node.state
        await until(lambda: head.admits)
        for _ in range(2 * serving_module.TRIES_MAX):
            for state in (away(good), good):
                node.state = state
                await asyncio.sleep(0.05)
        assert (head.cancels, len(head.admits), task.done()) == ([], 1, False)
        task.cancel()

    with_head(FakeHead(lambda admit: [Queued(admit.request_id, admit.attempt, 40)]), story)


def test_a_silent_head_is_left_at_once_for_an_instance_that_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_module, "SILENCE_S", 0.05)

    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        task = asyncio.create_task(all_of(serving, request()))
        await until(lambda: head.admits)
        both = beside(node.state, context_length=1024)
        first = both.instances[0].stages[0].node_id
        gone = away(both)
        assert gone.members[0].node_id == first
        node.state = with_instances(gone, gone.instances[0], on_one_node(gone.instances[1]))
        await until(lambda: head.cancels)
        task.cancel()

    with_head(FakeHead(lambda admit: rest_of("Hello")(admit)[:3]), story)


def with_instances(state: ClusterState, *instances: Instance) -> ClusterState:
    return msgspec.structs.replace(state, instances=instances, revision=state.revision + 1)


def on_one_node(instance: Instance) -> Instance:
    """Only its part on the second node."""
    return msgspec.structs.replace(instance, stages=instance.stages[1:])


def beside(state: ClusterState, context_length: int) -> ClusterState:
    """With a second instance of the model, on the same nodes and as ready, which is asked for first."""
    (one,) = state.instances
    stages = tuple(msgspec.structs.replace(each, runner_id=RunnerId(f"{each.runner_id}x")) for each in one.stages)
    changes: dict[str, Any] = {"instance_id": InstanceId("inst-0"), "stages": stages, "context_length": context_length}

    def member(each: Member) -> Member:
        assert each.report is not None
        more = (
            msgspec.structs.replace(
                runner, runner_id=RunnerId(f"{runner.runner_id}x"), instance_id=InstanceId("inst-0")
            )
            for runner in each.report.runners
        )
        report = msgspec.structs.replace(each.report, runners=(*each.report.runners, *more))
        return msgspec.structs.replace(each, report=report)

    members = tuple(member(each) for each in state.members)
    return with_instances(msgspec.structs.replace(state, members=members), one, msgspec.structs.replace(one, **changes))


def test_a_request_goes_to_an_instance_that_holds_its_prompt() -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        node.state = beside(node.state, context_length=4)
        assert text_of(await all_of(serving, request("Hi"))) == "Hello"
        assert text_of(await all_of(serving, request("A prompt of twenty."))) == "Hello"
        assert {hello.instance_id for hello in head.hellos} == {"inst-0", "inst-1"}
        assert [admit.token_count_max for admit in head.admits] == [2, 1024 - 19]

    with_head(FakeHead(says("Hello")), story)


def test_an_answer_goes_on_only_where_its_context_fits() -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        (long,) = node.state.instances
        task = asyncio.create_task(all_of(serving, request()))
        await until(lambda: head.admits)
        shorter = msgspec.structs.replace(long, context_length=3)
        node.state = with_instances(node.state, shorter)
        failed = (await task)[-1]
        assert isinstance(failed, GenerationFailed)
        assert "its context is shorter" in failed.message

    with_head(FakeHead(says("Hello"), hang_up_after=3), story)


def test_an_answer_that_goes_on_well_between_its_breaks_is_never_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_module, "SPACING_S", 0.0)
    whole = "x" * 200

    def say(admit: Admit) -> list[HeadEvent]:
        broken = Broken(admit.request_id, admit.attempt, "A part of the model was lost.", 503)
        return [*rest_of(whole)(admit)[:21], broken]

    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        task = asyncio.create_task(all_of(serving, request()))
        await until(lambda: len(head.admits) > serving_module.TRIES_MAX + 2)
        head.say = rest_of(whole)
        assert text_of(await task) == whole

    with_head(FakeHead(say), story)


def test_what_an_earlier_attempt_left_on_the_connection_is_not_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_module, "SPACING_S", 0.0)

    def say(admit: Admit) -> list[HeadEvent]:
        name = admit.request_id
        if admit.attempt == 1:
            return [Broken(name, 1, "A part of the model was lost.", 503)]
        late = Broken(name, 1, "A part of the model was lost.", 503)
        return [late, Ended(name, 1, FinishReason.CANCELLED, 0, TIMINGS), *rest_of("Hello")(admit)]

    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        assert text_of(await all_of(serving, request())) == "Hello"
        assert len(head.admits) == 2

    with_head(FakeHead(say), story)


@pytest.mark.parametrize("address", [Address("127.0.0.1", 70000), Address("a" * 99, 7), Address("\0", 7)])
def test_an_address_that_makes_no_sense_ends_the_request_and_not_the_node(
    monkeypatch: pytest.MonkeyPatch, address: Address
) -> None:
    monkeypatch.setattr(serving_module, "REACH_S_MAX", 0.1)

    async def run() -> None:
        async with Node(address, READY, READY).serving() as serving:
            for _ in range(2):
                (failed,) = await all_of(serving, request())
                assert isinstance(failed, GenerationFailed)
                assert failed.status == 503

    told(run)


def test_what_nobody_thought_of_ends_the_request_and_not_the_node(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serving_module, "REACH_S_MAX", 0.1)

    async def fail(*_: object) -> None:
        raise KeyError("odd")

    monkeypatch.setattr(head_module, "open_connection", fail)

    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        assert isinstance((await all_of(serving, request()))[-1], GenerationFailed)

    with_head(FakeHead(says("")), story)
    assert "was not connected to" in caplog.text


def test_a_head_that_can_not_be_reached_from_here_is_asked_last() -> None:
    """It takes no requests, so it is the least busy; others reach it, so that it stays."""

    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        both = beside(node.state, context_length=1024)
        near, far = (each.stages[0].runner_id for each in both.instances)

        def moved(member: Member) -> Member:
            assert member.report is not None
            runners = tuple(
                msgspec.structs.replace(each, data_address=Address("127.0.0.1", 1)) if each.runner_id == far else each
                for each in member.report.runners
            )
            return msgspec.structs.replace(member, report=msgspec.structs.replace(member.report, runners=runners))

        node.state = msgspec.structs.replace(both, members=tuple(moved(each) for each in both.members))
        assert text_of(await all_of(serving, request())) == "Hello"
        assert near != far

    with_head(FakeHead(says("Hello")), story)


def test_an_instance_with_too_little_room_is_no_reason_to_leave_one_that_is_unheard_for_a_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving_module, "SILENCE_S", 0.05)

    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        task = asyncio.create_task(all_of(serving, request("A prompt of twenty.")))
        await until(lambda: head.admits)
        gone = away(beside(node.state, context_length=4))
        node.state = with_instances(gone, gone.instances[0], on_one_node(gone.instances[1]))
        await asyncio.sleep(0.3)
        assert head.cancels == []
        task.cancel()

    with_head(FakeHead(lambda admit: rest_of("Hello")(admit)[:3]), story)


def test_an_exact_answer_goes_on_in_exact_mode_only() -> None:
    (rounding,) = cluster(READY, READY).instances
    exact = msgspec.structs.replace(rounding, exact=True)
    progress = serving_module.begin(request(), Letters(), [72, 105], exact)
    assert serving_module.needs_of(progress, exact).are_met_by(exact)
    assert not serving_module.needs_of(progress, exact).are_met_by(rounding)
    assert serving_module.needs_of(progress, rounding).are_met_by(exact)


def test_an_exact_answer_goes_on_with_a_cache_of_the_same_type() -> None:
    """Another one does with any: it is rounded by far more."""
    (full,) = cluster(READY, READY).instances
    for exact in (True, False):
        [first, second] = [msgspec.structs.replace(full, exact=exact, kv_cache=kind) for kind in KvCacheType]
        progress = serving_module.begin(request(), Letters(), [72, 105], first)
        assert serving_module.needs_of(progress, first).are_met_by(first)
        assert serving_module.needs_of(progress, first).are_met_by(second) is not exact


def test_an_answer_goes_on_with_the_weights_that_it_was_begun_with() -> None:
    (full,) = cluster(READY, READY).instances
    small = msgspec.structs.replace(full, quantize=Quantizing.Q4)
    progress = serving_module.begin(request(), Letters(), [72, 105], small)
    assert serving_module.needs_of(progress, small).are_met_by(small)
    assert not serving_module.needs_of(progress, small).are_met_by(full)
    assert not serving_module.needs_of(progress, full).are_met_by(small)


def test_an_answer_goes_on_rather_where_all_of_it_fits() -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        task = asyncio.create_task(all_of(serving, request(token_count_max=50)))
        await until(lambda: head.admits)
        node.state = beside(node.state, context_length=20)  # it holds the prompt and what has come
        assert text_of(await task) == "Hello"
        assert head.hellos[-1].instance_id == "inst-1"

    with_head(FakeHead(rest_of("Hello"), hang_up_after=3), story)


def test_a_head_that_hangs_is_waited_for_by_all_together() -> None:
    """It takes connections and says nothing: each one's wait is not added to the next one's."""
    waiting: set[asyncio.Task[None]] = set()

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as hung:
            place = HeadPlace(InstanceId("i"), NodeId("a"), (Address("127.0.0.1", hung.getsockname()[1]),))
            heads = Heads(credentials(1), lambda reader: waiting.add(asyncio.create_task(reader())))
            results = await asyncio.gather(*(heads.connect(place) for _ in range(5)), return_exceptions=True)
            assert [type(each) for each in results] == [HeadLostError] * 5
            await asyncio.gather(*waiting)

    told(run)
    assert len(waiting) == 1


def test_an_answer_is_not_gone_on_with_by_another_file_of_that_name() -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        task = asyncio.create_task(all_of(serving, request()))
        await until(lambda: head.admits)
        (instance,) = node.state.instances
        other = msgspec.structs.replace(instance, card=msgspec.structs.replace(CARD, quantization="Q8_0"))
        node.state = msgspec.structs.replace(node.state, instances=(other,))
        failed = (await task)[-1]
        assert isinstance(failed, GenerationFailed)
        assert "Another file goes by the name" in failed.message
        assert len(head.admits) == 1

    with_head(FakeHead(says("Hello"), hang_up_after=3), story)


def test_a_model_that_is_stopped_meanwhile_ends_the_answer_with_the_reason() -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        task = asyncio.create_task(all_of(serving, request()))
        await until(lambda: head.admits)
        node.state = msgspec.structs.replace(node.state, instances=(), wishes=())
        failed = (await task)[-1]
        assert isinstance(failed, GenerationFailed)
        assert "ended. Tiny-Chat is not placed" in failed.message

    with_head(FakeHead(says("Hello"), hang_up_after=3), story)


def test_a_head_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_module, "REACH_S_MAX", 0.5)

    async def run() -> None:
        async with FakeHead(says("")).listening() as head:
            gone = head.address
        async with Node(gone, READY, READY).serving() as serving:
            events = await all_of(serving, request())
            assert isinstance(events[0], GenerationFailed)
            assert f"The head at 127.0.0.1:{gone.port} can't be reached" in events[0].message

    told(run)


def test_a_head_that_refuses_before_anything_else() -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        assert await all_of(serving, request()) == [GenerationFailed("Busy.", 429)]

    with_head(FakeHead(lambda admit: [Broken(admit.request_id, 1, "Busy.", 429)]), story)


def test_a_place_in_the_queue_and_the_time_to_come_back_reach_the_client() -> None:
    """Also of a head that does not say yet how many wait."""

    def say(admit: Admit) -> list[HeadEvent]:
        name, attempt = admit.request_id, admit.attempt
        return [Queued(name, attempt, 2, 5), Queued(name, attempt, 1), Broken(name, attempt, "Busy.", 429, 9)]

    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        _, *events = await all_of(serving, request(account="3f2a"))
        assert events == [QueueProgressed(3, 5), QueueProgressed(2, 2), GenerationFailed("Busy.", 429, 9)]
        assert head.admits[0].account == "3f2a"

    with_head(FakeHead(say), story)


def test_a_request_that_breaks_every_head_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_module, "SPACING_S", 0.0)

    def say(admit: Admit) -> list[HeadEvent]:
        name, attempt = admit.request_id, admit.attempt
        return [Queued(name, attempt, 3), Broken(name, attempt, "The node berta is lost.", 503)]

    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        started, *_, failed = await all_of(serving, request())
        assert isinstance(started, GenerationStarted)
        assert isinstance(failed, GenerationFailed)
        assert failed.message.startswith("The node berta is lost. That happened 3 times in a row")
        assert (failed.status, len(head.admits)) == (503, 3)

    with_head(FakeHead(say), story)


def test_late_tokens_are_dropped_and_a_missing_one_is_a_failure() -> None:
    def doubled(admit: Admit) -> list[HeadEvent]:
        events = answer(admit, b"Hello")
        late = TokenSampled(admit.request_id, 0, 3, 88)
        return [*events[:3], events[2], late, *events[3:]]

    def gap(admit: Admit) -> list[HeadEvent]:
        events = answer(admit, b"Hello")
        return [*events[:2], *events[3:]]

    async def whole(head: FakeHead, node: Node, serving: Serving) -> None:
        assert text_of(await all_of(serving, request())) == "Hello"

    async def broken(head: FakeHead, node: Node, serving: Serving) -> None:
        events = await all_of(serving, request())
        assert isinstance(events[-1], GenerationFailed)
        assert "skipped a token" in events[-1].message

    with_head(FakeHead(doubled), whole)
    with_head(FakeHead(gap), broken)


def test_a_cancellation_that_nobody_asked_for_does_not_look_complete() -> None:
    def say(admit: Admit) -> list[HeadEvent]:
        return [Ended(admit.request_id, 1, FinishReason.CANCELLED, 0, TIMINGS)]

    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        assert isinstance((await all_of(serving, request()))[-1], GenerationFailed)

    with_head(FakeHead(say), story)


def test_a_prompt_longer_than_the_context_is_told_both_numbers() -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        (failed,) = await all_of(serving, request("x" * 1024))
        assert isinstance(failed, GenerationFailed)
        assert (failed.status, failed.param) == (400, "messages")
        assert "The prompt has 1024 tokens" in failed.message
        assert "holds 1024 with the answer" in failed.message
        assert head.admits == []

    with_head(FakeHead(says("Hello")), story)


def test_messages_that_the_template_refuses() -> None:
    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        failed = GenerationFailed("This model's template takes no system message.", 400, param="messages")
        assert await all_of(serving, request(role="system")) == [failed]

    with_head(FakeHead(says("Hello")), story)


# ---- before it is asked ----


def test_a_model_is_read_before_anybody_asks() -> None:
    """A tokenizer takes seconds: whoever asks first would wait, and a refusal would lose its status."""

    async def run() -> None:
        node = Node(Address("127.0.0.1", 9), RunnerState.IDLE, READY)
        async with node.serving() as serving:
            reading = asyncio.create_task(serving.read_ahead())
            await asyncio.sleep(0.05)
            assert node.loads == 0, "the file is not here yet"
            for revision, states in enumerate([(RunnerState.LOADING, READY), (READY, READY)], start=8):
                node.state = cluster(*states, revision=revision)
                await until(lambda: node.loads)
                await asyncio.sleep(0.03)
            assert node.loads == 1
            reading.cancel()

    told(run)


def test_a_model_of_other_nodes_is_not_read_ahead() -> None:
    async def run() -> None:
        node = Node(Address("127.0.0.1", 9), READY, READY)
        node.state = msgspec.structs.replace(node.state, node_id=NodeId("elsewhere"))
        async with node.serving() as serving:
            reading = asyncio.create_task(serving.read_ahead())
            await asyncio.sleep(0.05)
            assert node.loads == 0
            reading.cancel()

    told(run)


def test_a_file_that_breaks_its_reader_is_logged_and_the_node_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        node = Node(Address("127.0.0.1", 9), READY, READY)

        def load(_: Path | Checkpoint) -> Letters:
            node.loads += 1
            raise KeyError("what nobody thought of")

        texts = ModelTexts(node.file_of, load)
        async with Serving(lambda: node.state, node.wait_changed, texts, credentials(1)) as serving:
            reading = asyncio.create_task(serving.read_ahead())
            await until(lambda: node.loads)
            await asyncio.sleep(0.05)
            assert not reading.done()
            reading.cancel()

    told(run)
    assert "the text of Tiny-Chat could not be read ahead" in caplog.text
    assert "what nobody thought of" in caplog.text


# ---- not ready ----


def test_a_model_that_loads_is_waited_for() -> None:
    async def run() -> None:
        async with FakeHead(says("Hello")).listening() as head:
            node = Node(head.address, READY, RunnerState.LOADING)
            async with node.serving() as serving:
                task = asyncio.create_task(all_of(serving, request()))
                await asyncio.sleep(0.05)
                assert not task.done()
                node.state = at(cluster(READY, READY, revision=8), head.address)
                assert text_of(await task) == "Hello"

    told(run)


def test_a_model_that_loads_for_too_long_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing_module, "READY_S_MAX", 0.0)

    async def run() -> None:
        async with Node(Address("127.0.0.1", 9), READY, RunnerState.LOADING).serving() as serving:
            (failed,) = await all_of(serving, request())
            assert isinstance(failed, GenerationFailed)
            assert (failed.status, "loading" in failed.message) == (503, True)

    told(run)


@pytest.mark.timed
def test_a_model_that_has_no_room_without_a_lost_node_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new request soon, one whose answer has begun when nobody expects the node back."""
    monkeypatch.setattr(serving_module, "SILENCE_S", 0.05)
    monkeypatch.setattr(serving_module, "LOST_S", 0.1)
    monkeypatch.setattr(choosing_module, "RETURN_S", 0.1)
    monkeypatch.setattr(choosing_module, "RETURN_S_BEGUN", 0.6)
    monkeypatch.setattr(choosing_module, "LOOK_S", 0.1)

    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        task = asyncio.create_task(all_of(serving, request()))
        await until(lambda: head.admits)
        node.state = lacking(away(node.state))
        begun_s = time.monotonic()
        (failed,) = await all_of(serving, request())
        assert isinstance(failed, GenerationFailed)
        assert failed.status == 503
        assert "waiting for anna, without which it finds no room" in failed.message
        assert not task.done()
        last = (await task)[-1]
        assert isinstance(last, GenerationFailed)
        assert "finds no room" in last.message
        assert 0.6 < time.monotonic() - begun_s < 3

    with_head(FakeHead(lambda _: []), story)


@pytest.mark.parametrize("looks", [(1, 3), (2, 3, 2, 3)])  # of 0.2 s each: it loads, and lacks a node, in turn
def test_a_missing_node_has_its_time_from_when_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, looks: tuple[int, ...]
) -> None:
    """The request had waited for the load before, and the node is back before its time is over."""
    monkeypatch.setattr(choosing_module, "RETURN_S", 0.9)
    monkeypatch.setattr(choosing_module, "LOOK_S", 0.02)

    async def story(head: FakeHead, node: Node, serving: Serving) -> None:
        good = node.state
        loads = at(cluster(READY, RunnerState.LOADING), head.address)
        node.state = loads
        task = asyncio.create_task(all_of(serving, request()))
        await asyncio.sleep(0.5)
        for turn, count in enumerate(looks):
            changed = lacking(away(good)) if turn % 2 else loads
            node.state = msgspec.structs.replace(changed, revision=node.state.revision + 1)
            await asyncio.sleep(0.2 * count)
            assert not task.done()
        node.state = msgspec.structs.replace(good, revision=node.state.revision + 1)
        assert text_of(await task) == "Hello"

    with_head(FakeHead(says("Hello")), story)


def test_a_model_that_failed_is_told_at_once() -> None:
    async def run() -> None:
        node = Node(Address("127.0.0.1", 9), READY, READY)
        node.state = cluster(READY, RunnerState.FAILED, reason="Out of memory.")
        async with node.serving() as serving:
            (failed,) = await all_of(serving, request())
            assert isinstance(failed, GenerationFailed)
            assert (failed.status, "Out of memory." in failed.message) == (503, True)

    told(run)


def test_a_model_that_is_not_placed_is_told_how_to_place_it() -> None:
    async def run() -> None:
        node = Node(Address("127.0.0.1", 9))
        async with node.serving() as serving:
            (failed,) = await all_of(serving, request())
            assert isinstance(failed, GenerationFailed)
            assert failed.status == 404
            assert "covey place Tiny-Chat" in failed.message
            assert "POST /place_instance" in failed.message

    told(run)
