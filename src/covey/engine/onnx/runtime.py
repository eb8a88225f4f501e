"""The door to ONNX Runtime: what has to be said before it is imported, and to every session of it."""

import os
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # its builds report to their maker, and keep a device id, unless this is set
# Attention with a product for each head is 1.4 to 2.4 times as fast for one new token as the newer kernels for tiles,
# which were built without AVX, and 1.1 to 1.9 times as fast for chunks (docs/performance.md).
os.environ["ORT_GQA_DISABLE_FLASH_ATTENTION"] = "1"

import onnxruntime

LOG_ERRORS: Final = 3
# How an arena grows: to the next power of two, not by what is missing. Attention over 16-bit floats widens keys of a
# head for each thread, at every step a few more: what an arena had grown by for one step would be too small for the
# next. What no step has reached takes no memory.
DOUBLING: Final = 0
FILE_FOLDER: Final = "session.model_external_initializers_file_folder_path"


@cache
def _share_arena() -> None:
    """One for all sessions of the process: they run in turn, and each would keep its own for the largest step."""
    kind = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(kind, onnxruntime.OrtArenaCfg({"arena_extend_strategy": DOUBLING}))


def new_options(thread_count: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = thread_count
    options.inter_op_num_threads = 1
    options.log_severity_level = LOG_ERRORS
    _share_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")
    return options


def open_session(model: bytes, options: Any, weights: dict[str, NDArray[Any]]) -> Any:
    """`weights`: what the model names but does not hold."""
    names = list(weights)
    options.add_external_initializers(names, [shared(weights[name]) for name in names])
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def shared(array: NDArray[Any]) -> Any:
    """An OrtValue over the array's own memory, which it keeps alive."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
