"""The fake engine is strict about its contract: whoever drives it wrongly gets an error or another answer."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from covey.engine.contract import ALONE, Activations, Copy, EngineError, LoadProgress, Piece
from covey.engine.engines import create
from covey.engine.fake import FakeStage
from tests.engine.harness import loaded, make_spec


def make_stages(count: int) -> list[FakeStage]:
    return [loaded(make_spec(index, count)) for index in range(count)]


def run(stages: Sequence[FakeStage], pieces: Sequence[Piece], token_ids: Sequence[int]) -> Activations:
    values: Activations = np.array(token_ids, np.int64)
    for stage in stages:
        values = stage.run(pieces, values)
    return values


def last(slot: int, position: int, count: int) -> Piece:
    return Piece(slot, position, count, wants_logits=True)


TOKENS = [5, 9, 200, 9, 9, 31, 0, 77]


def test_the_number_of_stages_changes_nothing() -> None:
    whole = run(make_stages(1), [last(0, 0, 8)], TOKENS)
    assert whole.shape == (1, 256)
    assert whole.dtype == np.float32
    for count in (2, 3, 6):
        assert (run(make_stages(count), [last(0, 0, 8)], TOKENS) == whole).all()


def test_chunks_and_company_change_nothing() -> None:
    whole = run(make_stages(1), [last(0, 0, 8)], TOKENS)
    stages = make_stages(2)
    first = Piece(2, 0, 5, wants_logits=False)
    assert run(stages, [Piece(1, 0, 2, wants_logits=False), first], [1, 2, *TOKENS[:5]]).shape == (0, 256)
    logits = run(stages, [last(1, 2, 1), last(2, 5, 3)], [3, *TOKENS[5:]])
    assert logits.shape == (2, 256)
    assert (logits[1] == whole[0]).all()
    assert (logits[0] != whole[0]).any()


def test_going_back_drops_what_came_after() -> None:
    stages = make_stages(2)
    whole = run(stages, [last(0, 0, 8)], TOKENS)
    run(stages, [last(0, 4, 3)], [1, 2, 3])
    assert (run(stages, [last(0, 4, 4)], TOKENS[4:]) == whole).all()


def test_what_another_slot_holds_is_copied() -> None:
    stages = make_stages(2)
    whole = run(stages, [last(0, 0, 8)], TOKENS)
    run(stages, [last(1, 0, 3)], [*TOKENS[:2], 99])
    for slot, start in ((1, 2), (2, 0)):
        copied = Piece(slot, 6, 2, wants_logits=True, copy=Copy(0, start))
        assert (run(stages, [copied], TOKENS[6:]) == whole).all()


@pytest.mark.parametrize("change", [0, 3, 7])
def test_every_token_matters(change: int) -> None:
    other = [*TOKENS]
    other[change] += 1
    first, second = (run(make_stages(1), [last(0, 0, 8)], tokens) for tokens in (TOKENS, other))
    assert (first != second).any()


@pytest.mark.parametrize(
    ("pieces", "token_ids", "message"),
    [
        ([last(0, 3, 1)], [1], "holds 0 positions"),
        ([last(9, 0, 1)], [1], "does not exist"),
        ([last(0, 0, 1)], [1, 2], "do not fit"),
        ([last(0, 0, 1)], [256], "vocabulary"),
        ([last(0, 0, 1)], [-1], "vocabulary"),
        ([last(0, 0, 2049)], [1] * 2049, "is full"),
    ],
)
def test_wrong_steps_are_refused(pieces: list[Piece], token_ids: list[int], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        run(make_stages(1), pieces, token_ids)


def test_options_are_checked() -> None:
    assert loaded(make_spec(engine_options={"vocabulary_size": "9"}))._vocabulary_size == 9
    assert loaded(make_spec(engine_options={"exact": "1", "quantize": "q4", "kv_cache": "f16"}))
    with pytest.raises(EngineError, match="no option colour"):
        loaded(make_spec(engine_options={"colour": "red"}))
    with pytest.raises(EngineError, match="not a whole number"):
        loaded(make_spec(engine_options={"hidden_size": "wide"}))


def test_loading_tells_how_far_it_is() -> None:
    told: list[LoadProgress] = []
    FakeStage().load(make_spec(1, 2), told.append, ALONE)
    assert [progress.layers_loaded for progress in told] == [1, 2, 3]
    assert all(before.bytes_loaded < after.bytes_loaded <= after.bytes_total for before, after in pairwise(told))


def test_engines_are_found_by_name() -> None:
    assert isinstance(create(make_spec()), FakeStage)
    with pytest.raises(EngineError, match="no engine called abacus"):
        create(make_spec(engine="abacus"))


def test_guesses_have_the_logits_that_they_would_have_alone() -> None:
    stages = make_stages(2)
    whole = [run(stages, [last(0, 0, count)], TOKENS[:count]) for count in (6, 7, 8)]
    run(stages, [Piece(0, 0, 5, wants_logits=False)], TOKENS[:5])
    guessed = run(stages, [Piece(0, 5, 3, wants_logits=True, guess_count=2)], TOKENS[5:])
    assert (guessed == np.concatenate(whole)).all()
