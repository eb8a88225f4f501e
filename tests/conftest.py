"""Fixtures that all tests share."""

import os
from pathlib import Path

import anyio
import pytest
from hypothesis import HealthCheck, settings

from covey.checkpoints import catalogue

# The same examples on every run, however slow the machine.
settings.register_profile(
    "covey", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("covey")

DEMO_MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's file: `$COVEY_TEST_MODEL`, or the one in this user's models folder, fetched if need be."""
    chosen = os.environ.get("COVEY_TEST_MODEL")
    if chosen:
        assert Path(chosen).is_file(), f"COVEY_TEST_MODEL names {chosen}, where no file is"
        return Path(chosen)
    from covey.effects.model_files import ModelFiles  # imports half the program, which most tests don't need
    from covey.effects.paths import models_folder

    card = catalogue.find(DEMO_MODEL)
    assert card is not None
    return anyio.run(ModelFiles(models_folder()).ensure, card, lambda _done, _total: None)


TRIES_MORE = 2
# What is repeated: seconds that are more than allowed, as pytest words it. Another failure is one at the first try.
TOO_LATE = r"^AssertionError: (not within|assert \(?[\d.]+ (- [\d.]+\) )?<)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is long on purpose may be: its loops have their own ends. And what else runs on this machine can only delay:
    a limit in seconds has to be kept in one of a few tries, and the summary tells of each that was needed.
    """
    for item in items:
        if item.get_closest_marker("timed"):
            item.add_marker(pytest.mark.flaky(reruns=TRIES_MORE, only_rerun=[TOO_LATE]))
        if item.get_closest_marker("faults") or item.get_closest_marker("seeds"):
            item.add_marker(pytest.mark.timeout(0))
