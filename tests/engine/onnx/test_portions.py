"""A stage is loaded graph by graph, so that little of it is there twice at a time."""

from pathlib import Path

import numpy as np
import pytest
from tiny_llama import LAYERS, write_tiny_llama

from covey.checkpoints.checkpoint import Checkpoint
from covey.checkpoints.opening import open_checkpoint
from covey.engine.contract import ALONE, Piece
from covey.engine.onnx.portions import GRAPHS, portions
from covey.engine.onnx.settings import read_settings
from covey.engine.onnx.stage import OnnxStage
from covey.schema.model import Shard
from tests.engine.harness import make_spec


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf", {}, default="Q4_1")


def cut(header: Checkpoint, start: int = 0, end: int = LAYERS) -> list[tuple[int, int]]:
    parts = portions(header, read_settings(header), Shard(start, end, LAYERS), packs_itself=True)
    return [(part.layer_start, part.layer_end) for part in parts]


def test_where_another_packs_it_is_one_graph(tiny, monkeypatch):
    monkeypatch.setattr("covey.engine.onnx.portions.GRAPH_BYTES_MIN", 0)
    header = open_checkpoint(tiny)
    assert len(portions(header, read_settings(header), Shard(0, LAYERS, LAYERS), packs_itself=False)) == 1


def test_where_there_is_hardly_room_for_what_is_packed_it_is_several(tiny, monkeypatch):
    monkeypatch.setattr("covey.engine.onnx.portions.GRAPH_BYTES_MIN", 0)
    monkeypatch.setattr("covey.engine.onnx.kernel_file.has_room", lambda _: False)
    header = open_checkpoint(tiny)
    assert len(portions(header, read_settings(header), Shard(0, LAYERS, LAYERS), packs_itself=False)) > 1


def test_a_small_stage_is_one_graph(tiny):
    assert cut(open_checkpoint(tiny)) == [(0, LAYERS)]


def test_a_large_stage_is_several_of_which_the_largest_come_first(tiny, monkeypatch):
    """The output and the embedding, which are tied here, are as large as many layers in some models."""
    monkeypatch.setattr("covey.engine.onnx.portions.GRAPH_BYTES_MIN", 0)
    header = open_checkpoint(tiny)
    assert cut(header) == [(0, 1), (2, 3), (1, 2)]
    assert cut(header, 1, 2) == [(1, 2)]
    monkeypatch.setattr("covey.engine.onnx.portions.GRAPHS", 1)
    assert cut(header) == [(0, LAYERS)]
    assert GRAPHS > 1


def test_the_answer_is_the_same_however_many_graphs(tiny, monkeypatch):
    def logits() -> np.ndarray:
        stage = OnnxStage()
        stage.load(
            make_spec(engine="onnx", model_path=str(tiny), shard=Shard(0, LAYERS, LAYERS)), lambda _: None, ALONE
        )
        prompt = stage.run([Piece(0, 0, 9, wants_logits=True)], np.arange(9)).copy()
        return np.concatenate([prompt, stage.run([Piece(0, 9, 1, wants_logits=True)], np.array([5]))])

    monkeypatch.setattr("covey.engine.onnx.kernel_file.is_usable", lambda: False)
    one = logits()
    monkeypatch.setattr("covey.engine.onnx.portions.GRAPH_BYTES_MIN", 0)
    np.testing.assert_array_equal(logits(), one)
