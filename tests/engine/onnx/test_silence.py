"""The engine's library tells nobody that it runs, and leaves nothing outside of Covey's folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SESSION = """
import sys
{first}
import onnxruntime
from onnx import TensorProto, helper

value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value],
                          [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
"""


def left_behind(first: str, home: Path) -> list[Path]:
    """What a process that opens a session leaves in its user's folder.

    It gets no other variables of ours: the library is silent where one, like `CI`, says that it is built or tested.
    """
    home.mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    program = [sys.executable, "-c", SESSION.format(first=first)]
    subprocess.run(program, env=environment, check=True, timeout=60)
    return [path for path in home.rglob("*") if path.is_file()]


def test_a_session_leaves_no_trace(tmp_path: Path) -> None:
    assert left_behind("import covey.engine.onnx.session", tmp_path / "covey") == []


@pytest.mark.skipif(sys.platform != "linux", reason="the folder's place is known for Linux only")
def test_it_would_without_us(tmp_path: Path) -> None:
    """Else the test above shows nothing. Once this fails, a newer build has no telemetry, or hides it better."""
    assert left_behind("", tmp_path / "bare") != []
