"""What guessing from the text so far brings: the same answer with and without, in turn.

    python bench/prompt_lookup.py FILE.gguf [--rounds 5] [--threads 2]

The engine with its scheduler and sampler, in this process, greedy. Three prompts ask for what they hold: a table to be
copied, a file to be written again with one word changed, a passage to be repeated (small models tell it in words of
their own); one asks for something new. Told are steps, tokens a second, their ratio, and how long both say the same.
"""

import argparse
import time
from pathlib import Path
from statistics import median

from bare_engine import load, spec_of

from covey.engine.onnx.stage import OnnxStage
from covey.engine.sampler import Sampler
from covey.engine.scheduler import Scheduler
from covey.schema.generation import Admit, ChatMessage, Sampling, TokenSampled
from covey.schema.ids import RequestId
from covey.serving.model_text import load_model_text

CONTEXT, TOKENS = 1024, 160
PASSAGE = (
    "The town lies where two rivers meet. In spring the lower meadows stand under water for some weeks, and people go "
    "from house to house by boat. The market is held on Thursdays, in the hall that was built after the great fire. "
    "There is a school, a mill that has not turned for forty years, and a bridge of seven arches."
)
TABLE = """| name | born | town |
|---|---|---|
| Anna Berg | 1961 | Lund |
| Peter Holm | 1974 | Malmo |
| Karin Lind | 1980 | Uppsala |
| Erik Strand | 1955 | Gavle |
| Maria Nyman | 1990 | Kiruna |
"""
FILE = '''def area(width, height):
    """The area of a rectangle."""
    return width * height


def volume(width, height, depth):
    """The volume of a box."""
    return area(width, height) * depth


def surface(width, height, depth):
    """The surface of a box."""
    return 2 * (area(width, height) + area(width, depth) + area(height, depth))
'''
PROMPTS = {
    "table": f"Copy this table exactly:\n\n{TABLE}",
    "file": f"Here is a Python file:\n\n```python\n{FILE}```\n\nWrite the whole file again, with the word `depth` "
    "replaced by `length`.",
    "passage": f"Repeat this text word for word, twice:\n\n{PASSAGE}",
    "new": "Write a long story about a lighthouse keeper and his dog.",
}


def answer(stage: OnnxStage, prompt: list[int], *, looks_up: bool) -> tuple[list[int], int, float]:
    """The tokens after the first, the steps that brought them, and the seconds that these took."""
    scheduler = Scheduler(slot_count=1, context_length=CONTEXT, stage_count=1, looks_up=looks_up)
    sampler, tokens, steps, begun_s = Sampler(), list[int](), 0, 0.0
    scheduler.admit(1, admit(prompt), 0.0)
    while planned := scheduler.schedule(0.0):
        events = scheduler.learn(sampler.sample(planned.plan, stage.run(planned.plan.pieces, planned.token_ids)), 0.0)
        said = [each.event.token_id for each in events if isinstance(each.event, TokenSampled)]
        if begun_s:
            tokens, steps = tokens + said, steps + 1
        elif said:
            begun_s = time.perf_counter()
    return tokens, steps, time.perf_counter() - begun_s


def admit(prompt: list[int]) -> Admit:
    return Admit(
        request_id=RequestId("bench"),
        attempt=0,
        token_ids=tuple(prompt),
        prompt_length=len(prompt),
        sampling=Sampling(temperature=0.0),
        token_count_max=TOKENS,
        stop_token_ids=(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    stage = load(spec_of(options.model, options.threads, CONTEXT))
    text = load_model_text(options.model)
    for name, asked in PROMPTS.items():
        prompt = text.prompt_ids((ChatMessage("user", asked),))
        ratios: list[float] = []
        for _ in range(options.rounds):
            plain, plain_steps, plain_s = answer(stage, prompt, looks_up=False)
            guessed, steps, guessed_s = answer(stage, prompt, looks_up=True)
            ratios.append(plain_s / guessed_s)
        same = next((n for n, pair in enumerate(zip(plain, guessed, strict=False)) if pair[0] != pair[1]), len(plain))
        print(
            f"{name}: {len(plain)} tokens in {plain_steps} steps, {len(plain) / plain_s:.1f} tokens/s; with guesses in "
            f"{steps} steps, {len(guessed) / guessed_s:.1f} tokens/s; ratio {median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}); the first {same} tokens are the same"
        )


if __name__ == "__main__":
    main()
