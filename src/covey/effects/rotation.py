"""A new join code for those who stay: sealed to each, said again until each has confirmed, and taken up by all.

Whoever is not reached keeps the former code, and is told the new one by a person. Nothing here waits for a node that
is away: the point of a rotation is that a device was lost.
"""

import hmac
import logging
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import anyio

from covey.control.join_code import JoinCode
from covey.effects.code_file import CodeFileError
from covey.effects.identity import Identity
from covey.effects.sealed_code import SealError, opened_by, sealed_for
from covey.effects.trust import OPEN_CODE, derive, new_join_code
from covey.schema.cluster import CodeSealed, CodeTaken, Member, MeshMessage, Visibility
from covey.schema.ids import NodeId
from covey.schema.trust import RotationOutcome

CONFIRM_S_MAX: Final = 5.0
REPEAT_S: Final = 0.5
LINGER_S: Final = 1.5  # a node confirms again before it leaves for the new cluster, should its first word be lost
PROOF_BYTES: Final = 32

_log = logging.getLogger(__name__)


def proof_of(code: JoinCode) -> str:
    """What shows that somebody holds the code, and tells nothing of it: whoever asks for a rotation."""
    return derive(code, "rotation", "", PROOF_BYTES).hex()


class RotationError(Exception):
    """The code is not changed; the message is one sentence for a person."""


class Keep(Protocol):
    """Stores a code for all lives to come; `ends_keys` as in `CodeSealed`. Raises `CodeFileError`."""

    def __call__(self, code: JoinCode, *, ends_keys: bool) -> object: ...


class Rotation:
    """One node's part. `send` gives a message to the mesh, and is set once that is open."""

    def __init__(
        self,
        mine: Identity,
        code: JoinCode,
        keep: Keep,
        send: Callable[[NodeId, MeshMessage], None] = lambda _, __: None,
    ) -> None:
        self._mine = mine
        self._code = code
        self._keep = keep
        self.send = send
        self._new: JoinCode | None = None  # kept, for the life to come
        self._confirmed: set[NodeId] = set()
        self._changed = anyio.Event()
        self._taken = anyio.Event()

    @property
    def is_taken(self) -> bool:
        """Whether this node has a new code, which its next life uses."""
        return self._taken.is_set()

    async def wait_taken(self) -> None:
        """Returns when this node is to begin anew."""
        await self._taken.wait()
        await anyio.sleep(LINGER_S)

    def is_proof(self, proof: str) -> bool:
        """Of the present code, or of the one that is already kept."""
        codes = [self._code, *([self._new] if self._new else [])]
        return any(hmac.compare_digest(proof_of(code).encode(), proof.encode()) for code in codes)

    def hear(self, message: CodeSealed | CodeTaken) -> None:
        if isinstance(message, CodeTaken):
            self._confirmed.add(message.node_id)
            self._changed.set()
        elif message.target == self._mine.node_id and self._code != OPEN_CODE:  # which everybody holds
            self._take(message)

    def _take(self, message: CodeSealed) -> None:
        try:
            code = opened_by(self._mine.key, message.sealed, ends_keys=message.ends_keys)
        except SealError as error:
            _log.warning("node %s sent a new join code that is not taken: %s", message.node_id, error)
            return
        if self._new is None and not self._keeps(code, message):
            return
        if code != self._new:  # whoever sent it is not to believe that this node will be there
            _log.warning("node %s has changed the join code as well; this node keeps the first one", message.node_id)
            return
        self._taken.set()
        self.send(message.node_id, CodeTaken(self._mine.node_id, message.node_id))

    def _keeps(self, code: JoinCode, message: CodeSealed) -> bool:
        _log.warning("node %s has changed the join code; this node takes the new one", message.node_id)
        try:
            self._keep(code, ends_keys=message.ends_keys)
        except CodeFileError as error:
            _log.error("the new join code is lost on this node: %s", error)
            return False
        self._new = code
        return True

    async def rotate(self, members: Sequence[Member], without: Sequence[NodeId]) -> RotationOutcome:
        """Makes a new code, keeps it, and gives it to `members` but those `without`; returns who has it.

        Where somebody is shut out, API keys end with the former code: he may have seen some. Raises `CodeFileError`,
        and `RotationError` while another change is under way.
        """
        if self._new is not None:
            raise RotationError("the join code has just been changed; ask again in some seconds if it is to be another")
        code = new_join_code()
        staying = [each for each in members if each.node_id not in {self._mine.node_id, *without}]
        ends_keys = bool(without)
        sealed = self._sealed(staying, code, ends_keys=ends_keys)
        self._keep(code, ends_keys=ends_keys)
        self._new = code
        with anyio.move_on_after(CONFIRM_S_MAX):
            while left := [each for each in sealed if each.target not in self._confirmed]:
                self._changed = anyio.Event()
                for message in left:
                    self.send(message.target, message)
                with anyio.move_on_after(REPEAT_S):
                    await self._changed.wait()
        self._taken.set()
        reached = tuple(each.node_id for each in staying if each.node_id in self._confirmed)
        return RotationOutcome(reached, tuple(each.node_id for each in staying if each.node_id not in reached))

    def _sealed(self, members: Sequence[Member], code: JoinCode, *, ends_keys: bool) -> list[CodeSealed]:
        """For those who are here; a node that is away may be the lost one."""
        messages: list[CodeSealed] = []
        for member in members:
            if member.report is None or member.visibility is not Visibility.VISIBLE:
                continue
            try:
                sealed = sealed_for(member.node_id, member.report.public_key, code, ends_keys=ends_keys)
            except SealError as error:
                _log.warning("node %s is not given the new join code: %s", member.node_id, error)
            else:
                messages.append(CodeSealed(self._mine.node_id, member.node_id, sealed, ends_keys))
        return messages
