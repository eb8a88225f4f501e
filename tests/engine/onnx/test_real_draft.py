"""With a draft model an answer stays the same in exact mode: the demo model, drafted by itself and a rougher one.

Time stands still here, so that drafting always pays.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest

from covey.checkpoints.opening import open_checkpoint
from covey.checkpoints.tokenizer import token_texts
from covey.engine.contract import ALONE, EngineError
from covey.engine.cores import Cores
from covey.engine.draft import DraftModel
from covey.engine.drafting import Drafted, Drafter
from covey.engine.onnx.stage import OnnxStage
from covey.engine.sampler import Sampler
from covey.engine.scheduler import Scheduler
from covey.schema.generation import Sampling
from covey.schema.model import Shard
from covey.schema.runner import Draft, RunnerSpec
from tests.engine.harness import make_admit, make_spec, sampled
from tests.tiny_model import VOCABULARY, write_model

PROMPTS = [prompt["token_ids"] for prompt in json.loads((Path(__file__).parent / "prompts.json").read_text())]
LAYERS = 30
TOKENS = 48
CONTEXT = 512
SAMPLINGS = {
    "greedy": Sampling(temperature=0.0),
    "seeded": Sampling(temperature=0.8, top_p=0.95, seed=7),
    "penalized": Sampling(temperature=1.0, repetition_penalty=1.1, seed=8),
}


class Free:
    """A draft whose guesses take no time."""

    def __init__(self, draft: DraftModel) -> None:
        self._draft = draft

    def guess(self, tokens: Sequence[int], most: int, sampling: Sampling) -> Drafted:
        return self._draft.guess(tokens, most, sampling)._replace(reading_s=0.0, guessing_s=0.0)


def spec_of(path: Path, draft: Path | None = None) -> RunnerSpec:
    return make_spec(
        engine="onnx",
        engine_options={"exact": "1"},
        model_path=str(path),
        shard=Shard(0, LAYERS, LAYERS),
        context_length=CONTEXT,
        slot_count=1,
        thread_count=2,
        draft=draft and Draft(model_path=str(draft), layer_count=LAYERS),
    )


@pytest.fixture(scope="module")
def stage(demo_model: Path) -> OnnxStage:
    stage = OnnxStage()
    stage.load(spec_of(demo_model), lambda _: None, ALONE)
    return stage


@pytest.fixture(scope="module")
def rougher(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in Q4_0, which loses more of them."""
    reader = gguf.GGUFReader(demo_model)
    path = tmp_path_factory.mktemp("rougher") / "Q4_0.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, known in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = known.types[-1] if len(known.types) > 1 else None
            writer.add_key_value(key, known.contents(), known.types[0], sub_type=inner)
    for tensor in reader.tensors:
        content, kind = tensor.data, tensor.tensor_type
        if kind == gguf.GGMLQuantizationType.Q4_1:
            kind = gguf.GGMLQuantizationType.Q4_0
            content = gguf.quants.quantize(gguf.quants.dequantize(content, tensor.tensor_type), kind)
        writer.add_tensor(tensor.name, content, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def loaded(demo_model: Path, draft: Path) -> DraftModel:
    spec = spec_of(demo_model, draft)
    assert spec.draft is not None
    model = DraftModel(spec, spec.draft, Cores())
    model.load(spec, lambda _: None)
    model.warm_up()
    return model


def answer(stage: OnnxStage, prompt: list[int], sampling: Sampling, drafter: Drafter | None) -> tuple[list[int], int]:
    """Its tokens, and in how many steps they came."""
    scheduler = Scheduler(slot_count=1, context_length=CONTEXT, stage_count=1, looks_up=False, drafter=drafter)
    sampler, said, steps = Sampler(), list[int](), 0
    scheduler.admit(1, make_admit("r", prompt, TOKENS, sampling=sampling), 0.0)
    while planned := scheduler.schedule(0.0):
        logits = stage.run(planned.plan.pieces, planned.token_ids)
        said += sampled(each.event for each in scheduler.learn(sampler.sample(planned.plan, logits), 0.0))
        steps += 1
    return said, steps


def test_its_own_draft_is_right_nearly_always(stage: OnnxStage, demo_model: Path) -> None:
    drafter = Free(loaded(demo_model, demo_model))
    for name, sampling in SAMPLINGS.items():
        plain, _ = answer(stage, PROMPTS[0], sampling, None)
        said, steps = answer(stage, PROMPTS[0], sampling, drafter)
        print(f"{name}: {len(said)} tokens in {steps} steps")
        assert said == plain
        assert steps < (0.8 if name == "penalized" else 0.5) * TOKENS


def test_a_rougher_draft_is_right_often(stage: OnnxStage, demo_model: Path, rougher: Path) -> None:
    drafter = Free(loaded(demo_model, rougher))
    for prompt in PROMPTS[:2]:
        for name, sampling in SAMPLINGS.items():
            plain, _ = answer(stage, prompt, sampling, None)
            said, steps = answer(stage, prompt, sampling, drafter)
            print(f"{name}: {len(said)} tokens in {steps} steps")
            assert said == plain
            assert steps < TOKENS


def test_a_model_of_another_family_is_refused(demo_model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other.gguf")
    ours, theirs = (token_texts(open_checkpoint(path)) for path in (demo_model, other))
    first = int(np.flatnonzero(np.array(ours[:VOCABULARY]) != np.array(theirs))[0])
    with pytest.raises(EngineError, match="choose a draft of the same family") as error:
        loaded(demo_model, other)
    assert f"other.gguf: its token {first} is {theirs[first]!r}, the model's is {ours[first]!r}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "told"), [("gone.gguf", "is gone; put it back"), ("model.bin", "may be in a format that runs code")]
)
def test_a_draft_that_cannot_be_read_is_told_in_a_sentence(
    demo_model: Path, tmp_path: Path, name: str, told: str
) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(EngineError, match=told):
        loaded(demo_model, tmp_path / name)
