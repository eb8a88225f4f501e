"""One round of one fault: streams begin, something breaks, all of them end, and everything is as it was."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import census
from answers import Answer
from questions import TOKENS, Questions
from reference import judge
from rig import NAMES, Rig, until
from rows import Row

ROUNDS = int(os.environ.get("FAULTS_ROUNDS", "1"))
STOP_S = float(os.environ.get("FAULTS_STOP_S", "15"))  # how long what passes by itself lasts
BEGUN = 10  # tokens of each stream before something breaks
BEGIN_S_MAX = 90.0
END_S_MAX = 180.0  # for a stream, after the fault; a client that waits longer counts as hung
SETTLE_S_MAX = 30.0


@dataclass
class Fault:
    """All get the names of the nodes that hold the model, in order. `passes`: what ends by itself, after `STOP_S`.
    `mends`: what a person does once the streams have ended.
    """

    name: str
    breaks: Callable[[Rig, list[str]], None]
    passes: Callable[[Rig, list[str]], None] | None = None
    mends: Callable[[Rig, list[str]], None] | None = None
    leader: str = "dora"  # at first
    leader_holds: bool | None = None  # None: it does not matter


def arrange(rig: Rig, fault: Fault) -> list[str]:
    """Returns the names of the holders."""
    if fault.leader_holds is False:
        rig.arrange(holds=[name for name in NAMES if name != rig.leader()])
    else:
        rig.arrange()
    holders = rig.holders()
    assert fault.leader_holds is None or (rig.leader() in holders) is fault.leader_holds, (rig.leader(), holders)
    return holders


class Rounds:
    """All rounds of one fault in one cluster."""

    def __init__(self, rig: Rig, fault: Fault, questions: Questions) -> None:
        self.rig, self.fault, self.questions = rig, fault, questions
        self.row = Row(fault.name)
        self.before: census.Census | None = None

    def run(self, number: int) -> None:
        holders = arrange(self.rig, self.fault)
        until(lambda: self.rig.requests() == 0, SETTLE_S_MAX, "no requests", self.rig.told)
        before = self.before = self.before or self._first_census()
        streams = self._begin(number)
        broke_s = time.monotonic()
        self.fault.breaks(self.rig, holders)
        self._wait_ended(streams, broke_s, holders)
        if self.fault.mends:
            self.fault.mends(self.rig, holders)
        self.rig.wait_together()
        self.rig.wait_serving()
        self._count_streams(streams, broke_s)
        self._count_left(before)
        self.row.rounds += 1

    def _first_census(self) -> census.Census:
        """After each of the streams has been asked once: what a node reads for its first answer is no leak."""
        for stream in [Answer(self.rig.asked, self.rig.model, f"Hello {number}", 4) for number in range(4)]:
            stream.wait()
        until(lambda: self.rig.requests() == 0, SETTLE_S_MAX, "no requests", self.rig.told)
        return census.take(self.rig.home, self.rig.process_ids())

    def _begin(self, number: int) -> list[Answer]:
        prompts = self.questions.of_round(number)
        streams = [Answer(self.rig.asked, self.rig.model, prompt, TOKENS, END_S_MAX) for prompt in prompts]
        until(lambda: all(len(each.token_ids) > BEGUN for each in streams), BEGIN_S_MAX, "answering", self.rig.told)
        return streams

    def _wait_ended(self, streams: list[Answer], broke_s: float, holders: list[str]) -> None:
        passes = self.fault.passes
        while passes or not all(each.is_over for each in streams):
            lasted_s = time.monotonic() - broke_s
            if passes and lasted_s >= STOP_S:
                passes(self.rig, holders)
                passes = None
            if not passes and lasted_s >= max(END_S_MAX, STOP_S):
                return
            time.sleep(0.1)

    def _count_streams(self, streams: list[Answer], broke_s: float) -> None:
        row = self.row
        for stream in streams:
            row.streams += 1
            gap_s = stream.longest_wait_after_s(broke_s)
            row.gaps_s += [gap_s] if gap_s is not None else []
            self._count_end(stream)
            judged = judge(
                self.questions.reference,
                stream.prompt,
                self.questions.answers[stream.prompt],
                stream.token_ids,
                stream.read_again,
            )
            row.near += judged.near
            row.wrong += bool(judged.wrong)
            row.told += [judged.wrong] if judged.wrong else []

    def _count_end(self, stream: Answer) -> None:
        row, last = self.row, stream.last
        if not stream.is_over:
            row.hung += 1
            row.told.append(f"hung after {len(stream.token_ids)} tokens")
        elif last.get("type") == "GenerationFinished":
            self._count_whole(stream)
        elif last.get("message") and not stream.broken:
            row.errors.append(last["message"])
        else:
            row.wrong += 1
            row.told.append(f"ended without a word after {len(stream.token_ids)} tokens: {stream.broken or last}")

    def _count_whole(self, stream: Answer) -> None:
        """Whether what says that it is whole is whole: as long as was asked for, or ended by the model."""
        is_stopped = stream.last["reason"] == "stop" and self._may_stop(stream)
        if len(stream.token_ids) == TOKENS or is_stopped:
            self.row.completed += 1
            return
        self.row.wrong += 1
        self.row.told.append(f"cut short after {len(stream.token_ids)} tokens: {stream.last}")

    def _may_stop(self, stream: Answer) -> bool:
        """Where another head went on, its tokens may lead to another end than those of the first."""
        reference = self.questions.reference
        first = max(0, *(total - len(reference.prompt_ids(stream.prompt)) for total in (0, *stream.read_again)))
        return reference.ending_lacks(stream.prompt, stream.token_ids, first) == 0

    def _count_left(self, before: census.Census) -> None:
        row, rig = self.row, self.rig
        try:
            until(lambda: rig.requests() == 0, SETTLE_S_MAX, "no requests")
        except AssertionError:
            row.leaked += rig.requests()
            row.told.append(f"{rig.requests()} requests are still held")
        after, leaks = census.settled(before, rig.home, rig.process_ids(), SETTLE_S_MAX)
        orphans = census.orphans(rig.home, rig.process_ids())
        row.orphans += len(orphans)
        row.leaked += len(leaks)
        row.told += [*leaks, *(f"orphan {each.pid}: {each.cmdline()}" for each in orphans)]
        row.held_mib.append(after.resident_bytes / census.MIB)


def expect_clean(row: Row) -> None:
    """What is promised of every fault."""
    assert (row.wrong, row.hung, row.orphans, row.leaked, row.errors) == (0, 0, 0, 0, []), row.told + row.errors
    assert row.completed == row.streams, row.told


def repeat(rig: Rig, fault: Fault, questions: Questions, rows: list[Row], count: int) -> None:
    """One fault in a cluster: what was asked in the round before must not be asked again, or its cache is used."""
    rounds = Rounds(rig, fault, questions)
    rows.append(rounds.row)
    for number in range(count):
        rounds.run(number)
    print(rounds.row)
    expect_clean(rounds.row)
