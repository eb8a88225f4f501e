"""What the runners of a model hold with all slots full, and what placement sets aside for them: real processes."""

from pathlib import Path
from typing import Final

import numpy as np
import psutil

from covey.checkpoints.card import card_from_header
from covey.checkpoints.opening import open_checkpoint
from covey.control.placement.memory import Load, shard_bytes
from covey.schema.ids import ModelId
from covey.schema.model import FileSource, KvCacheType, Shard
from tests.engine.harness import Client, Runner, bring_up, make_admit, make_spec

ANSWER_TOKENS: Final = 8
ANSWER_SECONDS_MAX: Final = 1800


def measure(
    model: Path, context: int, slots: int, stages: int, *, exact: bool, kv_cache: KvCacheType = KvCacheType.F32
) -> list[dict[str, float]]:
    """Bytes of each stage's runner."""
    card = card_from_header(open_checkpoint(model), ModelId(model.stem), FileSource(str(model)))
    load, count = Load(card, context, slots, exact=exact, kv_cache=kv_cache), card.layer_count
    shards = [Shard(count * place // stages, count * (place + 1) // stages, count) for place in range(stages)]
    specs = [
        make_spec(
            index,
            stages,
            engine="onnx",
            engine_options={"kv_cache": kv_cache.value} | ({"exact": "1"} if exact else {}),
            model_path=str(model),
            shard=shard,
            context_length=context,
            slot_count=slots,
            vocabulary_size=card.vocabulary_size,
        )
        for index, shard in enumerate(shards)
    ]
    runners = [Runner(spec) for spec in specs]
    try:
        port = bring_up(runners)[0]
        loaded = [resident_bytes(runner) for runner in runners]
        fill(port, context, slots, card.vocabulary_size)
        return [
            {
                "predicted_bytes": shard_bytes(load, shard),
                "loaded_bytes": loaded_bytes,
                "full_bytes": resident_bytes(runner),
                "most_bytes": most_bytes(runner),
                "ratio": resident_bytes(runner) / shard_bytes(load, shard),
            }
            for shard, runner, loaded_bytes in zip(shards, runners, loaded, strict=True)
        ]
    finally:
        for runner in runners:
            runner.close()


def fill(port: int, context: int, slots: int, vocabulary_size: int) -> None:
    draw = np.random.default_rng(1)
    length = context - ANSWER_TOKENS
    prompts = draw.integers(0, vocabulary_size, (slots, length)).tolist()
    admits = [make_admit(f"r{slot}", prompt, ANSWER_TOKENS) for slot, prompt in enumerate(prompts)]
    with Client(port) as client:
        client.socket.settimeout(ANSWER_SECONDS_MAX)
        client.send(*admits)
        client.events_of_all([admit.request_id for admit in admits])


def resident_bytes(runner: Runner) -> int:
    return psutil.Process(runner.process.pid).memory_info().rss


def most_bytes(runner: Runner) -> int:
    """The most that was resident at any time; 0 where the system does not tell."""
    status = Path(f"/proc/{runner.process.pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
