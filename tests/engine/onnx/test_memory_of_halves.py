"""What attention over 16-bit floats takes beside its cache: it widens the keys of a head for each thread, at every step
for as many tokens as came before, and the memory of one step has to do for the next.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_llama

CONTEXT, HEADS, KV_HEADS, HEAD, THREADS = 6144, 16, 4, 128, 8
SCRIPT = """
import sys
import numpy as np
import psutil
from covey.engine.contract import ALONE, Piece
from covey.engine.onnx.stage import OnnxStage
from covey.schema.model import Shard
from tests.engine.harness import make_spec
path, context, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
stage = OnnxStage()
spec = make_spec(
    engine="onnx", engine_options={"kv_cache": "f16"}, model_path=path, shard=Shard(0, 1, 1),
    context_length=context, slot_count=1, thread_count=threads,
)
stage.load(spec, lambda _: None, ALONE)
stage.warm_up()
before = psutil.Process().memory_info().rss
for start in range(0, context, 128):
    stage.run([Piece(0, start, 128, wants_logits=False)], np.full(128, 7))
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident bytes are counted as Linux does")
def test_a_long_prompt_takes_no_more_memory_with_every_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than the cache, the scores, and some times what all threads widen at once."""
    for name, value in {"HEADS": HEADS, "KV_HEADS": KV_HEADS, "HEAD": HEAD, "LAYERS": 1}.items():
        monkeypatch.setattr(tiny_llama, name, value)
    path = tiny_llama.write_tiny_llama(tmp_path / "wide.gguf", {}, default="F16")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(CONTEXT), str(THREADS)],
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cache, scores = 2 * 2 * KV_HEADS * HEAD * CONTEXT, 4 * HEADS * 128 * CONTEXT
    widened = 4 * HEAD * CONTEXT * THREADS
    assert int(done.stdout) < cache + scores + 4 * widened
