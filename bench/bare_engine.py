"""The ONNX engine without anything around it: what the other files here compare with, or look at by itself."""

from pathlib import Path

from covey.checkpoints.gguf_file import read_header
from covey.engine.contract import ALONE
from covey.engine.onnx.stage import OnnxStage
from covey.schema.ids import RunnerId
from covey.schema.model import Shard
from covey.schema.runner import RunnerSpec


def layer_count(model: Path) -> int:
    metadata = read_header(model).metadata
    return int(metadata[f"{metadata['general.architecture']}.block_count"])


def spec_of(
    model: Path, threads: int, context_length: int, *, layer_end: int | None = None, exact: bool = False
) -> RunnerSpec:
    """Of a runner alone, with one slot, that holds the layers up to `layer_end`; all, if none is named."""
    layers = layer_count(model)
    return RunnerSpec(
        runner_id=RunnerId("bench"),
        instance_id="bench",
        engine="onnx",
        engine_options={"exact": "1"} if exact else {},
        model_path=str(model),
        shard=Shard(0, layers if layer_end is None else layer_end, layers),
        stage_index=0,
        stage_count=1,
        stage_node_ids=(),
        context_length=context_length,
        slot_count=1,
        thread_count=threads,
        listen_host="127.0.0.1",
        connect_ms=20_000,
    )


def load(*specs: RunnerSpec) -> OnnxStage:
    """Loaded as each of them in turn, and warm."""
    stage = OnnxStage()
    for spec in specs:
        stage.load(spec, lambda _: None, ALONE)
    stage.warm_up()
    return stage
