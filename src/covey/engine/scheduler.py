"""Decides what the next step computes: pure, told the time, without I/O.

A request waits in a bounded queue, fair between accounts (`waiting`), for a KV slot and keeps that slot until it ends.
What it has to compute is always
`tokens[sent:]`: at first its prompt, sent in chunks, later the one token that was sampled last. So a request that
waits for its token has nothing to send: at most one decode of it is in flight, while the chunks of a prompt follow
one another without waiting. Prefill and decode steps take turns: a long prompt stalls nobody who is being answered.

With n stages up to n steps of either kind are in flight, so that no stage idles while another one computes a chunk of a
prompt, which takes as long as many tokens. The decoding requests are dealt into n groups, one for each stage, of
neighbouring slots: an engine reads the weights once for these, and once more for each slot that lies apart. A slot is
given away as soon as its request ends: links keep the order, so what is in flight for the old one runs first.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from covey.engine.contract import Copy, Piece
from covey.engine.drafting import Drafter, Drafting
from covey.engine.guessing import Guesses
from covey.engine.plan import PlannedStep, Remark, SamplingStart, StepOutcome, StepPlan
from covey.engine.request import Key, Request, refusal
from covey.engine.sampler import is_penalized
from covey.engine.slots import Slots, most_shared
from covey.engine.waiting import Pace, Waiting, full
from covey.schema.generation import (
    PREFILL_CHUNK_TOKENS,
    Admit,
    Cancel,
    FinishReason,
    HeadEvent,
    Prefilled,
    TokenSampled,
)


class OwnedEvent(NamedTuple):
    """An event, and the connection that it is for."""

    owner: int
    event: HeadEvent


Events = list[OwnedEvent]


class StepOrderError(Exception):
    """An outcome is not that of the oldest step in flight; a stage has lost or repeated one."""


class _InFlight(NamedTuple):
    plan: StepPlan
    requests: list[Request]
    is_prefill: bool  # a chunk of a prompt, else the next tokens of a group
    begun: float  # seconds; guessing was over


class Scheduler:
    """`looks_up`: tokens are guessed, several in one step, where the text so far lets them be (`lookup`). `drafter`: a
    draft model guesses them for a request that runs alone, where that is expected to bring more (`drafting`).
    """

    def __init__(
        self,
        *,
        slot_count: int,
        context_length: int,
        stage_count: int,
        vocabulary_size: int = 0,
        looks_up: bool = True,
        drafter: Drafter | None = None,
    ) -> None:
        self._context_length = context_length
        self._stage_count = stage_count
        self._vocabulary_size = vocabulary_size  # 0: unknown
        self._looks_up = looks_up
        self._drafting = Drafting(drafter) if drafter else None
        self._slots = Slots(slot_count)
        self._pace = Pace(slot_count)
        self._waiting = Waiting[Request]()
        self._running: dict[Key, Request] = {}  # whose last step is the oldest comes first
        self._in_flight: deque[_InFlight] = deque()
        self._released: list[int] = []  # slots that the last stage may forget, told with the next plan
        self._steps = 0
        self._prefilled_last = False

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def queued_count(self) -> int:
        return len(self._waiting)

    # ---- requests come and go ----

    def admit(self, owner: int, admit: Admit, now: float) -> Events:
        """Takes a request in or refuses it. One that is known already is ignored."""
        request = Request(owner, admit, now)
        if request.key in self._running or request.key in self._waiting:
            return []
        if reason := refusal(admit, self._context_length, self._vocabulary_size):
            return [OwnedEvent(owner, request.broken(reason, 400))]
        if finished := request.finish_reason(self._context_length):
            return [OwnedEvent(owner, request.end(finished, now))]
        if self._slots.is_any_free:
            self._start(request)
            return []
        refused = self._waiting.enter(request)
        return self._places() if refused is None else [self._refuse(refused, request, now), *self._places()]

    def _refuse(self, refused: Request, newcomer: Request, now: float) -> OwnedEvent:
        """Tells one that can't wait here when to come back: the newcomer, or who makes room for it."""
        refused.ended = True
        held = (now - running.begun for running in self._running.values() if running.begun is not None)
        seconds = self._pace.retry_after_seconds(len(self._waiting), held)
        reason = full("The model is busy", made_room=refused is not newcomer)
        message = f"{reason}; try again in about {seconds} s."
        return OwnedEvent(refused.owner, refused.broken(message, 429, seconds))

    def cancel(self, owner: int, cancel: Cancel, now: float) -> Events:
        """Ends a request. One that is unknown has ended already."""
        key = (owner, cancel.request_id, cancel.attempt)
        return self._cancel(lambda request: request.key == key, now)

    def drop(self, owner: int, now: float) -> Events:
        """Cancels all requests of a connection that is gone."""
        return self._cancel(lambda request: request.owner == owner, now)

    def break_all(self, message: str, status: int) -> Events:
        """Ends all requests, because the runner ends."""
        requests = (*self._running.values(), *self._waiting)
        for request in requests:
            self._leave(request)
        return [OwnedEvent(request.owner, request.broken(message, status)) for request in requests]

    def _cancel(self, is_meant: Callable[[Request], bool], now: float) -> Events:
        meant = [request for request in (*self._running.values(), *self._waiting) if is_meant(request)]
        for request in meant:
            self._note_pace(request, now)
            self._leave(request)
        ends = [OwnedEvent(request.owner, request.end(FinishReason.CANCELLED, now)) for request in meant]
        return ends + self._refill() if meant else []

    def _start(self, request: Request) -> None:
        request.slot, request.cached = self._slots.take(request.tokens)
        request.sent = request.cached
        self._waiting.take_turn(request)
        self._running[request.key] = request

    def _leave(self, request: Request, *, is_cache_good: bool = True) -> None:
        request.ended = True
        self._waiting.leave(request)
        if self._running.pop(request.key, None):
            self._slots.give_back(request.slot, request.tokens[: request.sent] if is_cache_good else ())
            self._released.append(request.slot)

    def _refill(self) -> Events:
        """Gives free slots to those who wait, and tells the others their new places."""
        while self._waiting and self._slots.is_any_free:
            self._start(next(self._waiting.in_order(self._running_counts())))
        return self._places()

    def _places(self) -> Events:
        """The new places of those for whom something changed."""
        count, events = len(self._waiting), Events()
        for position, request in enumerate(self._waiting.in_order(self._running_counts())):
            if request.told != (position, count):
                request.told = (position, count)
                events.append(OwnedEvent(request.owner, request.queued(position, count)))
        return events

    def _running_counts(self) -> Counter[str]:
        return Counter(request.account for request in self._running.values())

    def _note_pace(self, request: Request, now: float) -> None:
        if request.begun is not None:
            self._pace.note(now - request.begun)

    # ---- steps ----

    def schedule(self, now: float) -> PlannedStep | None:
        """The next step, or None while nothing can be done but wait for an outcome or a request."""
        chosen = self._choose()
        return self._plan(chosen, now) if chosen else None

    def _choose(self) -> list[Request]:
        """Either one prompt's next chunk, or the next token of a group."""
        pending = [request for request in self._running.values() if request.is_pending]
        chunks = sum(step.is_prefill for step in self._in_flight)
        prefilling = [request for request in pending if not request.is_decoding and chunks < self._stage_count]
        group = self._group([request for request in pending if request.is_decoding], len(self._in_flight) - chunks)
        self._prefilled_last = bool(prefilling) and not (group and self._prefilled_last)
        return prefilling[:1] if self._prefilled_last else group

    def _group(self, pending: list[Request], in_flight: int) -> list[Request]:
        """The one whose first has waited longest, of those that are all there. Where none is, as after somebody came or
        went, a part of one goes only if stages would idle else: the rest of it is in flight, and to be caught up with.
        """
        if in_flight >= self._stage_count:
            return []
        slots = sorted(request.slot for request in self._running.values() if request.is_decoding)
        numbers = {slot: place * self._stage_count // len(slots) for place, slot in enumerate(slots)}
        sizes = Counter(numbers.values())
        parts: defaultdict[int, list[Request]] = defaultdict(list)
        for request in pending:
            parts[numbers[request.slot]].append(request)
        whole = [part for number, part in parts.items() if len(part) == sizes[number]]
        may_part = in_flight < max(self._stage_count - 1, 1)
        return next(iter([*whole, *(parts.values() if may_part else ())]), [])

    def _plan(self, requests: list[Request], now: float) -> PlannedStep:
        is_prefill = not requests[0].is_decoding
        begun = tuple(_sampling_start(request) for request in requests if request.begun is None)
        pieces: list[Piece] = []
        token_ids: list[int] = []
        guesses = self._guesses(requests)
        for request in requests:
            copy = self._catch_up(request)
            piece = _next_piece(request, len(guesses.token_ids), copy)
            pieces.append(piece)
            token_ids += request.tokens[piece.position : piece.position + piece.token_count]
            token_ids += guesses.token_ids
            request.sent += piece.token_count
            request.begun = now if request.begun is None else request.begun
            self._running[request.key] = self._running.pop(request.key)  # to the end of the round
        self._steps += 1
        guessed = {requests[0].slot: guesses.token_ids} if guesses.token_ids else {}
        plan = StepPlan(self._steps, tuple(pieces), begun, tuple(self._released), guessed)
        self._released.clear()
        self._in_flight.append(_InFlight(plan, requests, is_prefill, now + guesses.seconds))
        return PlannedStep(plan, np.array(token_ids, np.int64))

    def _catch_up(self, request: Request) -> Copy | None:
        """What another slot holds more of a prompt is copied, also where that one is still being computed: so requests
        with one beginning that come together compute it once.
        """
        if request.is_decoding:
            return None
        others = [each for each in self._running.values() if each is not request]
        held = [*self._slots.held(), *((each.slot, each.tokens[: each.sent]) for each in others)]
        source, length = most_shared(request.tokens[:-1], held, request.sent)
        if length == request.sent:
            return None
        copy = Copy(source, request.sent)
        request.cached += length - request.sent
        request.sent = length
        return copy

    def _guesses(self, requests: list[Request]) -> Guesses:
        """Only for one that goes by itself: the engine runs pieces of several tokens one by one, and reads the weights
        for each. The draft model's time is for one that is alone, too: the others would wait meanwhile.
        """
        request = requests[0]
        room = request.room_for_guesses(self._context_length)
        if len(requests) > 1 or not request.is_decoding or room < 1:
            return Guesses()
        found = request.lookup.guess(request.tokens, room) if self._looks_up else Guesses()
        if self._drafting is None or len(self._running) > 1:
            return found
        return self._drafting.improve(request, room, found)

    def learn(self, outcome: StepOutcome, now: float) -> Events:
        """Takes in what became of the oldest step in flight. Raises `StepOrderError`."""
        if not self._in_flight or outcome.step != self._in_flight[0].plan.step:
            raise StepOrderError(f"Step {outcome.step} came back out of turn.")
        plan, requests, is_prefill, begun = self._in_flight.popleft()
        if self._drafting and len(requests) == len(self._running) == 1 and not is_prefill:
            self._drafting.note_step(now - begun, plan.pieces[0].guess_count)
        places, unremarked = iter(range(len(outcome.token_ids))), Remark(outcome.failure)
        events: Events = []
        running_before = len(self._running)
        for piece, request in zip(plan.pieces, requests, strict=True):
            place = next(places) if piece.wants_logits else -1
            if request.ended:
                continue
            remark = outcome.remarks.get(place, unremarked)
            if remark.is_late:
                request.sent -= 1
                continue
            if not request.is_decoding:
                events.append(_progress(request, piece))
            if place >= 0:
                followers = outcome.followers.get(place, ())
                events += self._take_tokens(request, (outcome.token_ids[place], *followers), remark, now)
        return events + self._refill() if len(self._running) < running_before else events

    def _take_tokens(self, request: Request, token_ids: Sequence[int | None], remark: Remark, now: float) -> Events:
        """What a step has brought to one request, up to its end. What was guessed wrong was computed in vain."""
        events: Events = []
        for token_id in token_ids:
            request.sent = len(request.tokens)
            events += self._take_token(request, token_id, remark, now)
            if request.ended:
                break
        return events

    def _take_token(self, request: Request, token_id: int | None, remark: Remark, now: float) -> Events:
        if token_id is None:
            self._note_pace(request, now)
            self._leave(request, is_cache_good=False)
            return [OwnedEvent(request.owner, request.broken(remark.failure, remark.status))]
        request.answered = now if request.answered is None else request.answered
        request.tokens.append(token_id)
        finished = request.finish_reason(self._context_length)
        events: Events = []
        if finished is not FinishReason.STOP:
            position = len(request.tokens) - 1
            admit = request.admit
            sampled = TokenSampled(admit.request_id, admit.attempt, position, token_id, remark.likelihood)
            events.append(OwnedEvent(request.owner, sampled))
        if finished is not None:
            self._note_pace(request, now)
            self._leave(request)
            events.append(OwnedEvent(request.owner, request.end(finished, now)))
        return events


def _next_piece(request: Request, guess_count: int, copy: Copy | None) -> Piece:
    left = len(request.tokens) - request.sent
    count = min(left, PREFILL_CHUNK_TOKENS)
    return Piece(request.slot, request.sent, count + guess_count, count == left, guess_count, copy)


def _sampling_start(request: Request) -> SamplingStart:
    admit = request.admit
    prompt = admit.token_ids[: admit.prompt_length] if admit.sampling.repetition_penalty != 1.0 else ()
    wants_generated = is_penalized(admit.sampling) or admit.sampling.constraint is not None
    generated = admit.token_ids[admit.prompt_length :] if wants_generated else ()
    return SamplingStart(request.slot, admit.sampling, prompt, generated)


def _progress(request: Request, piece: Piece) -> OwnedEvent:
    admit = request.admit
    done = piece.position + piece.token_count
    total = len(admit.token_ids)
    return OwnedEvent(request.owner, Prefilled(admit.request_id, admit.attempt, done, total, request.cached))
