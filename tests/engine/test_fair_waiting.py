"""Two share a model: who sends a hundred requests does not hold up who sends one."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from covey.engine.plan import StepOutcome
from covey.engine.request import Request
from covey.engine.scheduler import Events, Scheduler
from covey.engine.waiting import QUEUE_MAX, RETRY_SECONDS_MAX, TURNS_MAX, Pace, Waiting
from covey.schema.generation import Admit, Broken, Cancel, Ended, Queued
from covey.schema.ids import RequestId
from tests.engine.harness import make_admit


def admit_of(account: str, number: int, count: int = 1) -> Admit:
    return make_admit(f"{account}{number}", [1, 2, 3], count, account=account)


def request_of(account: str, number: int) -> Request:
    return Request(1, admit_of(account, number), 0.0)


def waiting_of(*accounts: str) -> Waiting:
    waiting = Waiting()
    for number, account in enumerate(accounts):
        assert waiting.enter(request_of(account, number)) is None
    return waiting


def names(waiting: Waiting, running: dict[str, int] | None = None) -> list[str]:
    return [request.admit.request_id for request in waiting.in_order(running or {})]


class Shop:
    """A scheduler whose requests all end with their first token; the clock stands still while nothing runs."""

    def __init__(self, slot_count: int = 1) -> None:
        self.scheduler = Scheduler(slot_count=slot_count, context_length=100, stage_count=1)
        self.events: Events = []
        self.now = 0.0
        self.step = 0

    def admit(self, admit: Admit) -> None:
        self.events += self.scheduler.admit(1, admit, self.now)

    def serve_one(self, seconds: float = 1.0) -> None:
        planned = self.scheduler.schedule(self.now)
        assert planned is not None
        self.step, self.now = self.step + 1, self.now + seconds
        token_ids = tuple(7 for piece in planned.plan.pieces if piece.wants_logits)
        self.events += self.scheduler.learn(StepOutcome(self.step, token_ids), self.now)

    def served(self) -> list[str]:
        return [event.request_id for _, event in self.events if isinstance(event, Ended)]

    def refused(self) -> list[Broken]:
        return [event for _, event in self.events if isinstance(event, Broken)]


# ---- who is next ----


def test_accounts_take_turns_and_each_is_served_in_the_order_of_coming() -> None:
    assert names(waiting_of("a", "a", "a", "b", "c", "b")) == ["a0", "b3", "c4", "a1", "b5", "a2"]


def test_who_runs_less_goes_first() -> None:
    waiting = waiting_of("a", "b", "b")
    assert names(waiting, {"b": 1}) == ["a0", "b1", "b2"]
    assert names(waiting, {"a": 3, "b": 1}) == ["b1", "b2", "a0"]


def test_whose_turn_is_the_longest_ago_goes_first() -> None:
    waiting = waiting_of("a", "b", "c", "a")
    for account in ("c", "a", "b"):
        waiting.take_turn(request_of(account, 99))  # one that found a slot free
    assert names(waiting) == ["c2", "a0", "b1", "a3"]


def test_an_account_that_comes_back_is_not_taken_for_a_new_one() -> None:
    """Two that ask one thing after another, and so wait with one request at most, must not pass on a turn between them
    while a third waits for ever.
    """
    shop = Shop()
    for number in range(5):
        shop.admit(admit_of("patient", number))
    shop.admit(admit_of("x", 100))
    for number in range(12):
        shop.serve_one()
        account = shop.served()[-1][0]
        if account in "xp":
            shop.admit(admit_of("y" if account == "x" else "x", 101 + number))
        else:
            shop.admit(admit_of("x", 101 + number))
    served = shop.served()
    turns = [place for place, name in enumerate(served) if name.startswith("patient")]
    assert len(turns) >= 4
    assert max(after - before for before, after in pairwise(turns)) <= 3


def test_turns_of_accounts_are_not_remembered_for_ever() -> None:
    waiting = Waiting()
    for number in range(TURNS_MAX + 50):
        waiting.take_turn(request_of(f"account{number}", 1))
    assert len(waiting._turns) == TURNS_MAX
    assert "account49" not in waiting._turns


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_order_is_that_of_a_dumb_twin(seed: int) -> None:
    """For whatever comes, leaves and runs: the next is the one that the rule names, and so again without it."""
    chance = random.Random(seed)
    waiting, twin, turns = Waiting(), list[Request](), dict[str, int]()
    running = Counter({account: chance.randrange(3) for account in "abcd"})
    for number in range(60):
        request = request_of(chance.choice("abcde"), number)
        match chance.randrange(4):
            case 0 if twin:
                gone = twin.pop(chance.randrange(len(twin)))
                waiting.leave(gone)
            case 1:
                waiting.take_turn(request)
                turns[request.admit.account] = number + 1
            case _ if len(twin) < QUEUE_MAX:
                assert waiting.enter(request) is None
                twin.append(request)
            case _:
                pass
    lines = list(waiting._lines)  # of accounts that never had a turn, the one that has waited for longest comes first
    counts, turn, found = Counter(running), 1000, list[str]()
    while twin:
        chosen = min(
            twin,
            key=lambda each: (
                counts[each.admit.account],
                turns.get(each.admit.account, 0),
                lines.index(each.admit.account),
                twin.index(each),
            ),
        )
        twin.remove(chosen)
        found.append(chosen.admit.request_id)
        counts[chosen.admit.account] += 1
        turn += 1
        turns[chosen.admit.account] = turn
    assert names(waiting, running) == found


# ---- a full queue ----


def test_a_flood_of_one_account_does_not_keep_out_another() -> None:
    shop = Shop()
    for number in range(QUEUE_MAX + 1):  # one runs
        shop.admit(admit_of("flood", number))
    assert not shop.refused()
    shop.admit(admit_of("flood", 500))
    assert [each.request_id for each in shop.refused()] == ["flood500"]
    shop.admit(admit_of("guest", 1))
    assert [each.request_id for each in shop.refused()] == ["flood500", f"flood{QUEUE_MAX}"]
    assert "made room" in shop.refused()[-1].message
    assert shop.scheduler.queued_count == QUEUE_MAX
    places = [event.position for _, event in shop.events if isinstance(event, Queued) and event.request_id == "guest1"]
    assert places == [0]
    shop.serve_one()
    shop.serve_one()
    assert shop.served() == ["flood0", "guest1"]


def test_shares_become_even_and_then_nobody_is_displaced() -> None:
    waiting = waiting_of(*["a"] * QUEUE_MAX)
    went: Counter[str] = Counter()
    for number in range(200):
        for account in ("b", "a"):
            gone = waiting.enter(request_of(account, 1000 + number))
            assert gone is not None
            went[gone.admit.account if gone.admit.request_id != f"{account}{1000 + number}" else "refused"] += 1
    shares = Counter(request.admit.account for request in waiting)
    assert shares == {"a": QUEUE_MAX // 2, "b": QUEUE_MAX // 2}
    assert went["a"] == QUEUE_MAX // 2
    assert went["b"] == 0


def test_one_each_is_a_fair_share() -> None:
    """When as many wait as there are places, the last one is refused: it would only take another's place."""
    waiting = waiting_of(*(f"account{number}" for number in range(QUEUE_MAX)))
    newcomer = request_of("late", 1)
    assert waiting.enter(newcomer) is newcomer


@given(st.lists(st.sampled_from("abcdef"), min_size=80, max_size=300))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_who_waits_with_a_fair_share_is_never_displaced(coming: list[str]) -> None:
    waiting = Waiting()
    for number, account in enumerate(coming):
        shares = Counter(request.admit.account for request in waiting)
        request = request_of(account, number)
        gone = waiting.enter(request)
        assert len(waiting) <= QUEUE_MAX
        if gone is not None and gone is not request:
            assert shares[gone.admit.account] == max(shares.values()) > shares[account] + 1
            assert gone.key not in waiting


def test_a_displaced_request_is_gone() -> None:
    shop = Shop()
    for number in range(QUEUE_MAX + 1):
        shop.admit(admit_of("flood", number))
    shop.admit(admit_of("guest", 1))
    assert shop.scheduler.cancel(1, Cancel(RequestId(f"flood{QUEUE_MAX}"), 0), shop.now) == []
    for _ in range(QUEUE_MAX + 1):
        shop.serve_one()
    assert f"flood{QUEUE_MAX}" not in shop.served()
    assert (shop.scheduler.running_count, shop.scheduler.queued_count) == (0, 0)
    assert Counter(shop.served()) == Counter({f"flood{number}" for number in range(QUEUE_MAX)} | {"guest1"})


def test_slots_are_shared_out_evenly_while_both_have_enough_to_do() -> None:
    shop = Shop(slot_count=4)
    for number in range(40):
        shop.admit(admit_of("much", number, 5))
    for number in range(8):
        shop.admit(admit_of("little", number, 5))
    while sum(name.startswith("little") for name in shop.served()) < 8:
        shop.serve_one()
    much = sum(name.startswith("much") for name in shop.served())
    assert much <= 4 + 8 + 1  # the four that had begun, and about as many as the other


# ---- when to come back ----


@pytest.mark.parametrize(
    ("held", "waiting_count", "slot_count", "seconds"),
    [
        ([10.0, 20.0], 8, 4, 30),
        ([0.01], 64, 4, 1),
        ([30.0], 64, 1, RETRY_SECONDS_MAX),
        ([1000.0] + [2.0] * 32, 3, 2, 3),  # what was long ago does not count
    ],
)
def test_the_wait_is_that_of_the_queue(held: list[float], waiting_count: int, slot_count: int, seconds: int) -> None:
    pace = Pace(slot_count)
    for each in held:
        pace.note(each)
    assert pace.retry_after_seconds(waiting_count, [5.0]) == seconds


def test_before_any_has_ended_those_that_run_tell() -> None:
    assert Pace(2).retry_after_seconds(4, [3.0, 5.0]) == 8
    assert Pace(2).retry_after_seconds(4, []) == 1


def test_a_refusal_says_when_to_come_back() -> None:
    shop = Shop(slot_count=2)
    for number in range(QUEUE_MAX + 4):
        shop.admit(admit_of("a", number))
        if number == 2:
            shop.serve_one(seconds=0.5)
    (refused,) = shop.refused()
    assert (refused.status, refused.retry_after_s) == (429, QUEUE_MAX // 4)
    assert f"again in about {QUEUE_MAX // 4} s" in refused.message


def test_an_answer_that_has_begun_is_the_first_of_its_account_and_stays_whatever_waits() -> None:
    waiting = waiting_of(*["flood"] * QUEUE_MAX)
    begun = replace(admit_of("flood", 1000), prompt_length=1, attempt=2)
    assert waiting.enter(Request(1, begun, 0.0)) is None
    assert next(iter(waiting.in_order({}))).admit == begun
    for number in range(2 * QUEUE_MAX):
        waiting.enter(request_of(f"other {number}", number))
    assert begun in [each.admit for each in waiting]
