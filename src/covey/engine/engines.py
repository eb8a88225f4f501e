"""Finds the engine that a runner is to be. Each is imported only where it is used, since its library may be large."""

from covey.engine.contract import EngineError, StageEngine
from covey.schema.runner import RunnerSpec


def create(spec: RunnerSpec) -> StageEngine:
    """The engine that `spec` names, not loaded yet. Raises `EngineError` for a name that is not known."""
    if spec.engine == "fake":
        from covey.engine.fake import FakeStage  # noqa: PLC0415

        return FakeStage()
    if spec.engine == "onnx":
        from covey.engine.onnx.stage import OnnxStage  # noqa: PLC0415

        return OnnxStage()
    raise EngineError(f"There is no engine called {spec.engine}; choose onnx or fake.")
