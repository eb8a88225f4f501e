"""What a draft model brings: answers with and without one, in turn.

    python bench/draft.py FILE.gguf [--drafts Q4_0.gguf ...] [--times 12] [--rounds 2] [--tokens 64] [--threads 2]

A large model that says what FILE says is made of it: its layers, and `--times` as many in all, of which the others add
nothing to what goes through them (what they would add is multiplied by zeros) and take as long to compute. The drafts
are FILE in other quantisations: right often, not always. One more has the rows of its layers in another order, and is
always wrong: what that costs is the price of trying. Engine, scheduler and sampler are in this process; nothing is
looked up. Greedy, and drawn at temperature 0.7.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, Final

import gguf
import numpy as np
from bare_engine import layer_count, load, spec_of
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from covey.engine.cores import Cores
from covey.engine.draft import DraftModel
from covey.engine.onnx.stage import OnnxStage
from covey.engine.sampler import Sampler
from covey.engine.scheduler import Scheduler
from covey.schema.generation import Admit, ChatMessage, Sampling, TokenSampled
from covey.schema.ids import RequestId
from covey.schema.runner import Draft
from covey.serving.model_text import load_model_text

CONTEXT: Final = 512
PROMPTS: Final = (
    "Write a long story about a lighthouse keeper and his dog.",
    "Write a Python class for a queue that is kept in a list, with tests.",
    "Explain in detail how rain comes to be.",
)
SAMPLINGS: Final = {"greedy": Sampling(temperature=0.0), "drawn": Sampling(temperature=0.7, top_p=0.95, seed=5)}
SILENT: Final = ("attn_output.weight", "ffn_down.weight")  # what a layer adds goes through one of these
Tensor = tuple[str, Any, gguf.GGMLQuantizationType]


def stretched(reader: gguf.GGUFReader, layers: int, times: int) -> Iterator[Tensor]:
    for tensor in reader.tensors:
        head, _, rest = tensor.name.partition(".")
        if head != "blk":
            yield tensor.name, tensor.data, tensor.tensor_type
            continue
        number, _, name = rest.partition(".")
        for time_ in range(times):
            silent = time_ > 0 and name in SILENT
            data = np.zeros_like(tensor.data) if silent else tensor.data
            yield f"blk.{int(number) + layers * time_}.{name}", data, tensor.tensor_type


def scrambled(reader: gguf.GGUFReader) -> Iterator[Tensor]:
    for tensor in reader.tensors:
        mixes = tensor.name.startswith("blk.") and len(tensor.data) > 1 and tensor.data.ndim > 1
        yield tensor.name, tensor.data[::-1] if mixes else tensor.data, tensor.tensor_type


def write(reader: gguf.GGUFReader, path: Path, tensors: Callable[[], Iterator[Tensor]], layers: int) -> Path:
    """One tensor at a time."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, known in reader.fields.items():
        if key == "llama.block_count":
            writer.add_block_count(layers)
        elif not key.startswith("GGUF.") and key != "general.architecture":
            inner = known.types[-1] if len(known.types) > 1 else None
            writer.add_key_value(key, known.contents(), known.types[0], sub_type=inner)
    for name, data, kind in tensors():
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, data, _ in tensors():
        writer.write_tensor_data(np.ascontiguousarray(data))
    writer.close()
    return path


class Way:
    """One head, with a draft or without, in a slot of its own of the same engine."""

    def __init__(self, stage: OnnxStage, slot: int, draft: DraftModel | None) -> None:
        self._stage, self._slot = stage, slot
        self._scheduler = Scheduler(slot_count=1, context_length=CONTEXT, stage_count=1, looks_up=False, drafter=draft)
        self._sampler, self._requests = Sampler(), 0
        self.guessed = self.kept = self.steps = 0

    def answer(self, prompt: list[int], tokens: int, sampling: Sampling) -> tuple[list[int], float]:
        """The tokens after the first, and how many of them came a second."""
        self._requests += 1
        self._scheduler.admit(1, admit(f"r{self._requests}", prompt, tokens, sampling), time.monotonic())
        said, began = list[int](), 0.0
        while planned := self._scheduler.schedule(time.monotonic()):
            pieces = [replace(piece, slot=self._slot) for piece in planned.plan.pieces]
            outcome = self._sampler.sample(planned.plan, self._stage.run(pieces, planned.token_ids))
            events = self._scheduler.learn(outcome, time.monotonic())
            said += [each.event.token_id for each in events if isinstance(each.event, TokenSampled)]
            self.guessed += pieces[0].guess_count
            self.kept += sum(map(len, outcome.followers.values()))
            self.steps += began > 0
            began = began or (time.monotonic() if said else 0.0)
        return said[1:], (len(said) - 1) / (time.monotonic() - began)


def admit(name: str, prompt: list[int], tokens: int, sampling: Sampling) -> Admit:
    return Admit(
        request_id=RequestId(name),
        attempt=0,
        token_ids=tuple(prompt),
        prompt_length=len(prompt),
        sampling=sampling,
        token_count_max=tokens,
        stop_token_ids=(),
    )


def drafts(options: argparse.Namespace, large: Path, wrong: Path) -> Iterator[tuple[str, DraftModel]]:
    layers = layer_count(options.model)
    for path in (*options.drafts, wrong):
        draft = Draft(model_path=str(path), layer_count=layers)
        spec = replace(spec_of(large, options.threads, CONTEXT), draft=draft)
        model = DraftModel(spec, draft, Cores())
        model.load(spec, lambda _: None)
        model.warm_up()
        yield path.stem, model


def measure(options: argparse.Namespace, large: Path, wrong: Path) -> Table:
    stage = load(replace(spec_of(large, options.threads, CONTEXT), slot_count=2))
    text = load_model_text(options.model)
    prompts = [text.prompt_ids((ChatMessage("user", asked),)) for asked in PROMPTS]
    table = Table(
        "draft", "answers", "without: tokens/s", "with", "ratio", "guesses right", "tokens a step", "the same"
    )
    for name, draft in drafts(options, large, wrong):
        for kind, sampling in SAMPLINGS.items():
            table.add_row(name, kind, *compare(Way(stage, 0, None), Way(stage, 1, draft), prompts, options, sampling))
    return table


def compare(
    plain: Way, drafted: Way, prompts: list[list[int]], options: argparse.Namespace, sampling: Sampling
) -> tuple[str, ...]:
    without, with_, ratios, same, tokens = list[float](), list[float](), list[float](), 0, 0
    for _ in range(options.rounds):
        for prompt in prompts:
            said, speed = plain.answer(prompt, options.tokens, sampling)
            also_said, other_speed = drafted.answer(prompt, options.tokens, sampling)
            without, with_, ratios = [*without, speed], [*with_, other_speed], [*ratios, other_speed / speed]
            same, tokens = same + (said == also_said), tokens + len(also_said)
    return (
        f"{median(without):.2f}",
        f"{median(with_):.2f}",
        f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{drafted.kept} of {drafted.guessed}",
        f"{tokens / drafted.steps:.2f}",
        f"{same} of {len(ratios)}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--drafts", type=Path, nargs="*", default=())
    parser.add_argument("--times", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    reader, layers = gguf.GGUFReader(options.model), layer_count(options.model)
    with tempfile.TemporaryDirectory() as folder:
        many = layers * options.times
        large = write(reader, Path(folder) / "large.gguf", lambda: stretched(reader, layers, options.times), many)
        wrong = write(reader, Path(folder) / "wrong.gguf", lambda: scrambled(reader), layers)
        Console().print(measure(options, large, wrong))


if __name__ == "__main__":
    main()
