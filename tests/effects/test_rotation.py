"""A laptop was stolen. Those who stay get a new code; the thief, who still listens, can't read it."""

from collections.abc import Callable

import anyio
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from msgspec.structs import replace

from covey.control.join_code import JoinCode
from covey.effects import rotation as rotation_module
from covey.effects.identity import Identity
from covey.effects.rotation import Rotation, RotationError, proof_of
from covey.effects.sealed_code import SealError, _montgomery, opened_by, sealed_for
from covey.effects.trust import OPEN_CODE
from covey.schema.cluster import CodeSealed, CodeTaken, Member, MeshMessage, NodeReport, Visibility
from covey.schema.ids import NodeId
from covey.schema.trust import RotationOutcome
from tests.credentials import CODE, OTHER_CODE, node

pytestmark = pytest.mark.anyio
Tamper = Callable[[MeshMessage], MeshMessage | None]


def public_key(mine: Identity) -> bytes:
    return mine.key.public_key().public_bytes_raw()


def member(mine: Identity, **changes: object) -> Member:
    report = NodeReport(
        node_id=mine.node_id, boot=1, sequence=1, name="n", version="1", api_address=None, hardware=None,
        downloads=(), runners=(), public_key=changes.get("public_key", public_key(mine)),  # type: ignore[arg-type]
    )  # fmt: skip
    visibility = changes.get("visibility", Visibility.VISIBLE)
    return Member(node_id=mine.node_id, visibility=visibility, heard_ms_ago=0, report=report)  # type: ignore[arg-type]


# ---- the seal ----


@pytest.mark.parametrize("number", range(20))
def test_a_nodes_sealing_key_follows_from_its_identity(number: int) -> None:
    """Both halves, by different ways: the private one by hash, the public one by the map between the curves."""
    import hashlib

    mine = node(number)
    private = X25519PrivateKey.from_private_bytes(hashlib.sha512(mine.key.private_bytes_raw()).digest()[:32])
    assert private.public_key().public_bytes_raw() == _montgomery(public_key(mine))


def test_only_the_one_it_is_for_can_open_it() -> None:
    sealed = sealed_for(node(1).node_id, public_key(node(1)), OTHER_CODE)
    assert opened_by(node(1).key, sealed) == OTHER_CODE
    with pytest.raises(SealError):
        opened_by(node(2).key, sealed)
    assert OTHER_CODE.secret not in sealed
    assert sealed != sealed_for(node(1).node_id, public_key(node(1)), OTHER_CODE)


@pytest.mark.parametrize("place", [0, 31, 32, 50, -1])
def test_what_was_touched_does_not_open(place: int) -> None:
    sealed = bytearray(sealed_for(node(1).node_id, public_key(node(1)), OTHER_CODE))
    sealed[place] ^= 1
    with pytest.raises(SealError):
        opened_by(node(1).key, bytes(sealed))


@pytest.mark.parametrize("sealed", [b"", b"x", bytes(32), bytes(64), bytes(1000)])
def test_nonsense_does_not_open(sealed: bytes) -> None:
    with pytest.raises(SealError):
        opened_by(node(1).key, sealed)


@pytest.mark.parametrize("key", [b"", public_key(node(2)), bytes(32)])
def test_nothing_is_sealed_to_a_key_that_is_not_the_nodes(key: bytes) -> None:
    """A thief reports his own key in the name of a node that stays."""
    with pytest.raises(SealError):
        sealed_for(node(1).node_id, key, OTHER_CODE)


# ---- among nodes ----


class World:
    """Nodes 0 to 2, with what each keeps. `deliver` may lose or change a message."""

    def __init__(self, deliver: Tamper = lambda message: message) -> None:
        self.codes: dict[NodeId, JoinCode] = {}
        self.ended: set[NodeId] = set()  # where no API key is to be valid any more
        self.heard: list[MeshMessage] = []
        self._deliver = deliver
        self.rotations = {node(number).node_id: self._rotation(node(number)) for number in range(3)}

    def _rotation(self, mine: Identity) -> Rotation:
        def keep(code: JoinCode, *, ends_keys: bool) -> None:
            self.codes[mine.node_id] = code
            self.ended |= {mine.node_id} if ends_keys else set()

        return Rotation(mine, CODE, keep, self._send)

    def _send(self, target: NodeId, message: MeshMessage) -> None:
        self.heard.append(message)
        arrived = self._deliver(message)
        if isinstance(arrived, CodeSealed | CodeTaken):
            self.rotations[target].hear(arrived)


MINE, STAYS, LOST = (node(number) for number in range(3))


async def test_those_who_stay_take_the_new_code() -> None:
    world = World()
    outcome = await world.rotations[MINE.node_id].rotate([member(MINE), member(STAYS), member(LOST)], [LOST.node_id])
    assert (outcome.reached, outcome.missed) == ((STAYS.node_id,), ())
    assert set(world.codes) == {MINE.node_id, STAYS.node_id}
    assert len({code.secret for code in world.codes.values()} | {CODE.secret}) == 2
    taken = {node_id for node_id, each in world.rotations.items() if each.is_taken}
    assert taken == {MINE.node_id, STAYS.node_id}


async def test_who_shuts_somebody_out_ends_the_keys_everywhere() -> None:
    world = World()
    await world.rotations[MINE.node_id].rotate([member(STAYS), member(LOST)], [LOST.node_id])
    assert world.ended == {MINE.node_id, STAYS.node_id}


async def test_else_the_keys_stay() -> None:
    world = World()
    await world.rotations[MINE.node_id].rotate([member(STAYS)], [])
    assert world.ended == set()


async def test_nobody_can_change_on_the_way_whether_the_keys_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation_module, "CONFIRM_S_MAX", 0.2)

    def deliver(message: MeshMessage) -> MeshMessage:
        return replace(message, ends_keys=not message.ends_keys) if isinstance(message, CodeSealed) else message

    world = World(deliver)
    await world.rotations[MINE.node_id].rotate([member(STAYS)], [LOST.node_id])
    assert set(world.codes) == {MINE.node_id}


async def test_the_one_who_was_removed_hears_everything_and_learns_nothing() -> None:
    world = World()
    await world.rotations[MINE.node_id].rotate([member(STAYS), member(LOST)], [LOST.node_id])
    seals = [message.sealed for message in world.heard if isinstance(message, CodeSealed)]
    assert seals
    for sealed in seals:
        with pytest.raises(SealError):
            opened_by(LOST.key, sealed)
        assert world.codes[MINE.node_id].secret not in sealed


async def test_words_that_are_lost_are_said_again() -> None:
    lost = {CodeSealed: 2, CodeTaken: 2}

    def deliver(message: MeshMessage) -> MeshMessage | None:
        lost[type(message)] -= 1
        return None if lost[type(message)] >= 0 else message

    world = World(deliver)
    with anyio.fail_after(4):
        outcome = await world.rotations[MINE.node_id].rotate([member(STAYS)], [])
    assert outcome.reached == (STAYS.node_id,)
    assert world.codes[MINE.node_id] == world.codes[STAYS.node_id]


async def test_who_is_not_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation_module, "CONFIRM_S_MAX", 0.2)
    world = World(lambda _: None)
    members = [member(STAYS), member(LOST, visibility=Visibility.AWAY), member(node(7), public_key=b"")]
    outcome = await world.rotations[MINE.node_id].rotate(members, [])
    assert outcome.reached == ()
    assert outcome.missed == (STAYS.node_id, LOST.node_id, node(7).node_id)
    assert {message.target for message in world.heard if isinstance(message, CodeSealed)} == {STAYS.node_id}
    assert world.rotations[MINE.node_id].is_taken


async def test_of_two_rotations_at_once_each_reports_only_who_took_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two people hear of the stolen laptop, and each changes the code at another device."""
    monkeypatch.setattr(rotation_module, "CONFIRM_S_MAX", 0.5)
    monkeypatch.setattr(rotation_module, "REPEAT_S", 0.05)
    world = World(lambda message: message if len(world.codes) > 1 else None)
    members = [member(MINE), member(STAYS), member(LOST)]
    outcomes: dict[NodeId, RotationOutcome] = {}

    async def rotate(mine: Identity) -> None:
        outcomes[mine.node_id] = await world.rotations[mine.node_id].rotate(members, [])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rotate, MINE)
        tasks.start_soon(rotate, STAYS)
    for mine, outcome in outcomes.items():
        for node_id in (MINE.node_id, STAYS.node_id, LOST.node_id):
            has_it = world.codes[node_id] == world.codes[mine]
            assert (node_id in outcome.reached) == (has_it and node_id != mine)
            assert (node_id in outcome.missed) == (not has_it)


async def test_a_second_code_is_not_taken_and_not_confirmed() -> None:
    world = World()
    await world.rotations[MINE.node_id].rotate([member(STAYS)], [])
    first = world.codes[STAYS.node_id]
    heard = len(world.heard)
    for code, confirmations in ((OTHER_CODE, 0), (first, 1)):
        sealed = sealed_for(STAYS.node_id, public_key(STAYS), code)
        world.rotations[STAYS.node_id].hear(CodeSealed(LOST.node_id, STAYS.node_id, sealed))
        assert len(world.heard) - heard == confirmations
    assert world.codes[STAYS.node_id] == first


async def test_a_second_rotation_at_the_same_node_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation_module, "CONFIRM_S_MAX", 0.2)
    world = World(lambda _: None)
    mine = world.rotations[MINE.node_id]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(mine.rotate, [member(STAYS)], [])
        await anyio.sleep(0.05)
        code = world.codes[MINE.node_id]
        with pytest.raises(RotationError):
            await mine.rotate([member(STAYS)], [])
    with pytest.raises(RotationError):
        await mine.rotate([member(STAYS)], [])
    assert world.codes[MINE.node_id] == code


async def test_what_is_for_another_node_changes_nothing() -> None:
    world = World()
    sealed = sealed_for(STAYS.node_id, public_key(STAYS), OTHER_CODE)
    world.rotations[LOST.node_id].hear(CodeSealed(MINE.node_id, STAYS.node_id, sealed))
    world.rotations[LOST.node_id].hear(CodeSealed(MINE.node_id, LOST.node_id, sealed))
    assert not world.codes
    assert not world.rotations[LOST.node_id].is_taken


async def test_in_an_open_cluster_nobody_can_give_this_device_a_code() -> None:
    """Whoever is on the network is a member there: the next start without --open would be in his cluster."""
    kept: list[JoinCode] = []

    def keep(code: JoinCode, *, ends_keys: bool) -> None:
        kept.append(code)

    mine = Rotation(MINE, OPEN_CODE, keep)
    mine.hear(CodeSealed(LOST.node_id, MINE.node_id, sealed_for(MINE.node_id, public_key(MINE), OTHER_CODE)))
    assert not kept
    assert not mine.is_taken


def test_only_who_holds_the_code_may_rotate_it() -> None:
    mine = World().rotations[MINE.node_id]
    assert mine.is_proof(proof_of(CODE))
    for wrong in ("", "ü", proof_of(OTHER_CODE), proof_of(CODE)[:-1]):
        assert not mine.is_proof(wrong)
