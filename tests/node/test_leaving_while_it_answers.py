"""Ctrl-C at the node that a client is connected to, while its answer comes from another node, and another one waits."""

import signal
from pathlib import Path

import pytest
from answers import Answer
from nodes import running, until
from tiny_model import write_model


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_answer_from_elsewhere_and_one_that_waits_end_with_the_reason(
    tmp_path: Path, number: signal.Signals
) -> None:
    model = write_model(tmp_path / "model.gguf", layers=4)
    with running(tmp_path, "asked", "holder", step_delay_ms="50") as (asked, holder):
        until(lambda: len(asked.visibility()) == len(holder.visibility()) == 2)
        asked.post("/place_instance", {"model_id": str(model), "node_ids": [holder.node_id], "slot_count": 1})
        until(lambda: list(asked.runners().values()) == ["Ready"])
        answers = [Answer(asked, model, "Hi", 1000)]
        until(lambda: len(answers[0].token_ids) > 10)
        answers.append(Answer(asked, model, "Hello", 1000))
        until(lambda: bool(answers[1].last) or answers[1].is_over)
        assert not any(each.is_over for each in answers)
        assert asked.leave(number) == 0
        until(lambda: all(each.is_over for each in answers))
        for each in answers:
            assert each.broken == ""
            assert (each.last["type"], each.last["status"]) == ("GenerationFailed", 503)
            assert each.last["message"].startswith("This node is being stopped")
        assert list(holder.runners().values()) == ["Ready"]
