"""What a person may set in the environment of a node."""

import pytest

from covey.control.settings import PhaseLimits
from covey.effects.time_limits import VARIABLES, TimeLimitError, time_limits


def test_nothing_set_is_the_default() -> None:
    assert time_limits({}) == time_limits({"COVEY_LOAD_TIMEOUT_S": ""}) == PhaseLimits()


def test_every_phase_can_be_given_its_time() -> None:
    given = {name: str(number + 1.5) for number, name in enumerate(VARIABLES)}
    assert time_limits(given) == PhaseLimits(
        connect_ms=1_500, load_ms=2_500, warm_up_ms=3_500, step_ms=4_500, shut_down_ms=5_500
    )


@pytest.mark.parametrize("text", ["soon", "0", "0.9", "-3", "86401", "nan", "inf", "10s", " "])
def test_what_is_no_time_is_a_sentence(text: str) -> None:
    with pytest.raises(TimeLimitError) as refused:
        time_limits({"COVEY_STEP_TIMEOUT_S": text})
    sentence = "which is no number of seconds from 1 to 86400; correct it, or unset it"
    assert str(refused.value) == f"COVEY_STEP_TIMEOUT_S is '{text}', {sentence}"
