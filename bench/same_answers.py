"""Whether an answer depends on how it is computed: each way against batch 1 on one node, greedy.

    python bench/same_answers.py FILE.gguf [--prompts 6] [--tokens 48] [--threads 1] [--json]

The engine with its scheduler and sampler, in this process, in exact mode and as it is. The prompts are passages of a
book, of different lengths, that are continued. Where an answer parts from the plain one, told are how close the plain
one's first two logits were there, and how far logits are apart at most as long as both have said the same: the rounding
that decides. After it the texts differ, so no more of such an answer is compared.
"""

import argparse
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from bare_engine import layer_count, load, spec_of
from exactness import TEXT, tokens_of
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from covey.engine.contract import Piece
from covey.engine.onnx.stage import OnnxStage
from covey.engine.sampler import Sampler
from covey.engine.scheduler import Scheduler
from covey.schema.generation import Admit, Sampling
from covey.schema.ids import RequestId
from covey.schema.model import Shard

CONTEXT: Final = 700
LENGTHS: Final = (30, 400, 120, 600, 260, 520, 75, 310)  # of prompts, in tokens; up to three chunks
Answers = list[np.ndarray]  # of each prompt the logits before each token: [tokens, vocabulary]


class Machine:
    """Stages of one mode, with a slot for each prompt."""

    def __init__(self, model: Path, bounds: tuple[int, ...], slots: int, threads: int, *, exact: bool) -> None:
        spec = replace(spec_of(model, threads, CONTEXT, exact=exact), slot_count=slots)
        shards = [Shard(start, end, bounds[-1]) for start, end in pairwise(bounds)]
        self.stages: list[OnnxStage] = [load(replace(spec, shard=shard)) for shard in shards]

    def run(self, pieces: tuple[Piece, ...], values: np.ndarray) -> np.ndarray:
        for stage in self.stages:
            values = stage.run(pieces, values)
        return values.copy()


def plainly(machine: Machine, prompt: list[int], count: int, chunk: int) -> np.ndarray:
    """No scheduler: the prompt in chunks, then token by token."""
    tokens, logits = list(prompt), list[np.ndarray]()
    for start in range(0, len(prompt), chunk):
        part = np.array(prompt[start : start + chunk], np.int64)
        last = machine.run((Piece(0, start, len(part), wants_logits=True),), part)
    while True:
        logits.append(last[0])
        if len(logits) == count:
            return np.stack(logits)
        tokens.append(int(last[0].argmax()))
        last = machine.run((Piece(0, len(tokens) - 1, 1, wants_logits=True),), np.array(tokens[-1:], np.int64))


def served(machine: Machine, prompts: list[list[int]], count: int, slots: int, *, looks_up: bool) -> Answers:
    """Of all prompts at once, as far as there are slots."""
    scheduler = Scheduler(slot_count=slots, context_length=CONTEXT, stage_count=1, looks_up=looks_up)
    sampler, asked_in = Sampler(), dict[int, int]()
    found: list[dict[int, np.ndarray]] = [{} for _ in prompts]
    for number, prompt in enumerate(prompts):
        scheduler.admit(1, admit(number, prompt, count), 0.0)
    while planned := scheduler.schedule(0.0):
        plan = planned.plan
        logits = machine.run(plan.pieces, planned.token_ids)
        asked_in |= {start.slot: start.sampling.seed for start in plan.begun}
        row = 0
        for piece in plan.pieces:
            number = asked_in[piece.slot]
            first = piece.position + piece.token_count - piece.guess_count - len(prompts[number])
            # What follows a wrong guess is computed again by a later step, and replaced.
            found[number] |= {first + place: logits[row + place] for place in range(piece.row_count)}
            row += piece.row_count
        scheduler.learn(sampler.sample(plan, logits), 0.0)
    return [np.stack([answer[place] for place in range(count)]) for answer in found]


def admit(number: int, prompt: list[int], count: int) -> Admit:
    """The seed, which nothing greedy uses, says in the plan whose slot it is."""
    return Admit(
        request_id=RequestId(f"r{number}"),
        attempt=0,
        token_ids=tuple(prompt),
        prompt_length=len(prompt),
        sampling=Sampling(temperature=0.0, seed=number),
        token_count_max=count,
        stop_token_ids=(),
    )


def after_another(machine: Machine, prompt: list[int], count: int) -> np.ndarray:
    """In a slot that holds the first half of the prompt, and another answer to it."""
    return served(machine, [prompt[: len(prompt) // 2], prompt], count, 1, looks_up=False)[1]


class Ways(NamedTuple):
    plain: Answers
    others: dict[str, Callable[[], Answers]]


def ways(model: Path, prompts: list[list[int]], count: int, threads: int, *, exact: bool) -> Ways:
    layers, slots = layer_count(model), len(prompts)
    one = Machine(model, (0, layers), slots, threads, exact=exact)
    cuts = {"2 stages": (0, layers * 2 // 5, layers), "3 stages": (0, layers // 3, layers * 2 // 3, layers)}

    def split(bounds: tuple[int, ...]) -> Answers:
        machine = Machine(model, bounds, 1, threads, exact=exact)
        return [plainly(machine, prompt, count, CONTEXT) for prompt in prompts]

    others: dict[str, Callable[[], Answers]] = {
        f"{slots} at once": lambda: served(one, prompts, count, slots, looks_up=False),
        "chunks of 128": lambda: [plainly(one, prompt, count, 128) for prompt in prompts],
        "chunks of 33": lambda: [plainly(one, prompt, count, 33) for prompt in prompts],
        "prefix held": lambda: [after_another(one, prompt, count) for prompt in prompts],
        "prompt lookup": lambda: [served(one, [prompt], count, 1, looks_up=True)[0] for prompt in prompts],
        **{name: lambda bounds=bounds: split(bounds) for name, bounds in cuts.items()},
    }
    return Ways([plainly(one, prompt, count, CONTEXT) for prompt in prompts], others)


def compare(plain: Answers, other: Answers) -> dict[str, float]:
    same, gaps, apart = 0, list[float](), 0.0
    for expected, actual in zip(plain, other, strict=True):
        own = expected.argmax(axis=-1)
        parted = np.flatnonzero(own != actual.argmax(axis=-1))
        end = int(parted[0]) + 1 if parted.size else len(own)
        apart = max(apart, float(np.abs(expected[:end] - actual[:end]).max()))
        same += not parted.size
        if parted.size:
            first, second = np.sort(expected[end - 1])[:-3:-1]
            gaps.append(float(first - second))
    return {"same": same, "of": len(plain), "widest_gap": max(gaps, default=0.0), "logit_difference_max": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=6, choices=range(1, len(LENGTHS) + 1))
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    text = tokens_of(options.model, TEXT.read_text(), 2000)
    prompts = [text[170 * place : 170 * place + length] for place, length in enumerate(LENGTHS[: options.prompts])]
    found: dict[str, dict[str, Any]] = {}
    table = Table("mode", "way", "same answers", "widest gap where they part", "logits differ by at most")
    for mode, exact in (("exact", True), ("as it is", False)):
        plain, others = ways(options.model, prompts, options.tokens, options.threads, exact=exact)
        for way, compute in others.items():
            each = compare(plain, compute())
            found.setdefault(mode, {})[way] = each
            print(mode, way, each, file=sys.stderr, flush=True)
            gap, apart = (f"{each[key]:.1e}" for key in ("widest_gap", "logit_difference_max"))
            table.add_row(mode, way, f"{each['same']} of {each['of']}", gap, apart)
    if options.json:
        print(json.dumps({"model": options.model.stem, "tokens": options.tokens, "modes": found}))
    else:
        Console().print(table)


if __name__ == "__main__":
    main()
