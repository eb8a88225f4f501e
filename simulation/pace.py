"""What a node does again, it does no sooner than it may: nothing repeats without back-off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from covey.schema.cluster import Heartbeat, Instance, IntentUpdate, NodeReport
from covey.schema.ids import NodeId, RunnerId
from covey.schema.machine import (
    Effect,
    EntriesKept,
    Input,
    KeepEntries,
    KeepingFailed,
    MessageReceived,
    Publish,
    SendTo,
    StopRunner,
)
from simulation.failure import Failure

if TYPE_CHECKING:
    from covey.control.machine import Machine
    from simulation.host import Host

LONG_AGO_MS = -(10**9)


class Pace:
    """Of one life of one host, by its own clock. (Starts and fetches, which back off by outcome: see `safety`.)"""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.map_sent_ms: dict[tuple[NodeId, int], int] = {}  # to which life of a node
        self.reported_ms = LONG_AGO_MS
        self.beats_ms: list[int] = []
        self.stopped: dict[tuple[RunnerId, int], None] = {}  # processes that were asked to stop
        self.assigned_ms: dict[str, int] = {}  # wishes that were assigned without a command
        self.keep_failed, self.keep_failed_ms = 0, LONG_AGO_MS  # the last write that did, and when
        self.is_copy_awaited = False  # somebody asked for one since a write failed

    def hear(self, news: Input) -> None:
        """Before the step."""
        if isinstance(news, KeepingFailed) and news.token > self.keep_failed:
            self.keep_failed, self.keep_failed_ms, self.is_copy_awaited = news.token, self.host.now_ms, False
        elif isinstance(news, EntriesKept) and news.token > self.keep_failed:
            self.keep_failed_ms = LONG_AGO_MS  # the disk takes writes again
        message = news.message if isinstance(news, MessageReceived) else None
        if isinstance(message, IntentUpdate) and self.host.node_id in message.keepers:
            self.is_copy_awaited = True

    def check(self, machine: Machine, effect: Effect) -> None:
        """After it."""
        match effect:
            case SendTo(_, IntentUpdate()):
                self._check_map(machine, effect)
            case KeepEntries():
                self._check_keep(machine, effect)
            case StopRunner(runner_id, attempt):
                if (runner_id, attempt) in self.stopped:
                    self._fail(f"it stops attempt {attempt} of {runner_id} twice")
                self.stopped[runner_id, attempt] = None
            case Publish(NodeReport()):
                if self.host.now_ms - self.reported_ms < machine.settings.report_spacing_ms:
                    self._fail(f"it reports again after {self.host.now_ms - self.reported_ms} ms")
                self.reported_ms = self.host.now_ms
            case Publish(Heartbeat()):
                self._check_beat(machine)
            case _:
                pass

    def mend(self, machine: Machine, instance: Instance) -> None:
        """A leader's own assignment; each round of its mending looks at a wish once."""
        now_ms = self.host.now_ms
        since_ms = now_ms - self.assigned_ms.get(instance.wish_id, LONG_AGO_MS)
        if since_ms < machine.settings.tidy_ms:
            self._fail(f"{instance.wish_id} is assigned again after {since_ms} ms")
        self.assigned_ms[instance.wish_id] = now_ms

    def _check_map(self, machine: Machine, effect: SendTo) -> None:
        peer = machine.membership.peers.get(effect.target)
        if peer is None:
            self._fail(f"it sends its map to {effect.target}, which is not there")
            return
        life = (effect.target, peer.boot)  # one that left and is back at once may have lost what it was sent
        since_ms = self.host.now_ms - self.map_sent_ms.get(life, LONG_AGO_MS)
        if since_ms < machine.settings.intent_send_ms:
            self._fail(f"it sends its map to {effect.target} again after {since_ms} ms")
        self.map_sent_ms[life] = self.host.now_ms

    def _check_keep(self, machine: Machine, effect: KeepEntries) -> None:
        """A write that failed is put off, unless somebody waits for what comes with the next one."""
        since_ms = self.host.now_ms - self.keep_failed_ms
        is_awaited = any(promise.token == effect.token for promise in machine.deciding.promises.values())
        if since_ms < machine.settings.keep_back_off_ms[0] and not is_awaited and not self.is_copy_awaited:
            self._fail(f"it writes to its disk again {since_ms} ms after that failed")

    def _check_beat(self, machine: Machine) -> None:
        now_ms = self.host.now_ms
        self.beats_ms = [*(at_ms for at_ms in self.beats_ms if at_ms > now_ms - 10_000), now_ms]
        if len(self.beats_ms) > 2 * 10_000 // machine.settings.heartbeat_ms:
            self._fail(f"it sent {len(self.beats_ms)} heartbeats in 10 s")

    def _fail(self, sentence: str) -> None:
        raise Failure(f"{self.host.name}: {sentence}")
