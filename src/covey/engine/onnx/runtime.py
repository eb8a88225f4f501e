"""The door to ONNX Runtime: what has to be said before it is imported, and to every session of it."""

import os
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # its builds report to their maker, and keep a device id, unless this is set

import onnxruntime

LOG_ERRORS: Final = 3
FILE_FOLDER: Final = "session.model_external_initializers_file_folder_path"


def new_options(thread_count: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = thread_count
    options.inter_op_num_threads = 1
    options.log_severity_level = LOG_ERRORS
    return options


def open_session(model: bytes, options: Any, weights: dict[str, NDArray[Any]]) -> Any:
    """`weights`: what the model names but does not hold."""
    names = list(weights)
    options.add_external_initializers(names, [shared(weights[name]) for name in names])
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def shared(array: NDArray[Any]) -> Any:
    """An OrtValue over the array's own memory, which it keeps alive."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
