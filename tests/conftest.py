"""Fixtures that all tests share."""

import os
from pathlib import Path

import anyio
import pytest

from covey.checkpoints import catalogue
from covey.effects.model_files import ModelFiles
from covey.effects.paths import models_folder


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's file: `$COVEY_TEST_MODEL`, or the one of the models folder, fetched if it is not there."""
    chosen = os.environ.get("COVEY_TEST_MODEL")
    if chosen:
        return Path(chosen)
    card = catalogue.find("SmolLM2-135M-Instruct")
    assert card is not None
    return anyio.run(ModelFiles(models_folder()).ensure, card, lambda *_: None)
