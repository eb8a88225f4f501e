"""How far the engine is from plain arithmetic: both are led along the same real text, and say what comes next.

    python bench/exactness.py FILE.gguf ... [--tokens 2000] [--window 500] [--text FILE ...] [--decode] [--llama]
        [--threads 1] [--json]

The other side is a float64 twin in NumPy (`tests/engine/onnx/llama_twin.py`), on the weights as the `gguf` package
dequantises them. The engine reads the text as it reads prompts, in chunks, as it is and in exact mode; with --decode
also token by token, as it answers. With --llama llama.cpp is led along, too, token by token: it rounds activations to 8
bits as the engine does, and tells only its choice.

Told are in how many of the places both name the same next token, the perplexity against the twin's, the differences of
logits, and how close the twin's first two were where they part. The text is the opening of "Alice's Adventures in
Wonderland" by Lewis Carroll (1865, in the public domain).
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from bare_engine import load, spec_of
from rich.console import Console
from rich.table import Table

from covey.checkpoints.opening import open_checkpoint
from covey.checkpoints.tokenizer import load_tokenizer
from covey.engine.contract import Piece
from covey.engine.onnx.stage import OnnxStage
from covey.schema.generation import PREFILL_CHUNK_TOKENS

ROOT: Final = Path(__file__).resolve().parent.parent
TEXT: Final = ROOT / "tests" / "engine" / "onnx" / "alice.txt"
sys.path.insert(0, str(ROOT))  # the twin lives with the tests

from tests.engine.onnx.llama_twin import LlamaTwin, log_odds  # noqa: E402

CHUNKS: Final = {  # whether exact, and how many tokens go together
    "chunks": (False, PREFILL_CHUNK_TOKENS),
    "exact, chunks": (True, PREFILL_CHUNK_TOKENS),
}
ONE_BY_ONE: Final = {"one by one": (False, 1), "exact, one by one": (True, 1)}
LLAMA: Final = "llama.cpp"


@dataclass
class Comparison:
    """What was found so far of one way to compute, against the twin. Surprise is in nats."""

    places: int = 0
    agreed: int = 0
    surprise: float = 0.0
    twin_surprise: float = 0.0
    divergence: float = 0.0
    difference: float = 0.0  # sum of the mean of each place
    largest: float = 0.0
    gaps: list[float] = field(default_factory=list[float])  # the twin's, between its own choice and the other's

    def add(self, expected: np.ndarray, actual: np.ndarray, following: list[int]) -> None:
        """Logits of consecutive places, and the tokens that the text goes on with."""
        own, theirs = actual.argmax(axis=-1), expected.argmax(axis=-1)
        rows = np.arange(len(following))
        apart = np.abs(actual - expected)
        odds, twin_odds = log_odds(actual), log_odds(expected)
        self.places += len(following)
        self.agreed += int((own == theirs).sum())
        self.surprise -= odds[rows, following].sum()
        self.twin_surprise -= twin_odds[rows, following].sum()
        self.divergence += (np.exp(twin_odds) * (twin_odds - odds)).sum()
        self.difference += apart.mean(axis=-1).sum()
        self.largest = max(self.largest, float(apart.max()))
        self.gaps += (expected[rows, theirs] - expected[rows, own])[own != theirs].tolist()

    def figures(self) -> dict[str, float]:
        perplexity, twin_perplexity = (math.exp(each / self.places) for each in (self.surprise, self.twin_surprise))
        return {
            "places": self.places,
            "top1_percent": 100 * self.agreed / self.places,
            "perplexity": perplexity,
            "twin_perplexity": twin_perplexity,
            "perplexity_ratio": perplexity / twin_perplexity,
            "mean_divergence_nats": self.divergence / self.places,
            "logit_difference_mean": self.difference / self.places,
            "logit_difference_max": self.largest,
            "parted_gap_median": float(np.median(self.gaps)) if self.gaps else 0.0,
            "parted_gap_max": max(self.gaps, default=0.0),
        }


def engine_logits(stage: OnnxStage, token_ids: list[int], chunk: int) -> np.ndarray:
    """Of every token, from an empty cache. A guess is a token whose logits are wanted, too, so all can be had."""
    found: list[np.ndarray] = []
    for start in range(0, len(token_ids), chunk):
        tokens = np.array(token_ids[start : start + chunk], np.int64)
        piece = Piece(0, start, len(tokens), wants_logits=True, guess_count=len(tokens) - 1)
        found.append(stage.run([piece], tokens).copy())
    return np.concatenate(found)


def llama_choices(model: Path, windows: list[list[int]], threads: int) -> list[np.ndarray]:
    """What llama.cpp would say after each token. What it has read it keeps, so each takes it one step."""
    import xllamacpp  # noqa: PLC0415  # only tests and benches have it

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.n_ctx = max(map(len, windows)) + 16
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = threads
    parameters.warmup = False
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)

    def choice(tokens: list[int]) -> int:
        asked = {"prompt": tokens, "n_predict": 1, "n_probs": 1, "temperature": 0, "cache_prompt": True}
        return server.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["id"]

    return [np.array([choice(window[:end]) for end in range(1, len(window))]) for window in windows]


def compare(
    model: Path, windows: list[list[int]], threads: int, ways: dict[str, tuple[bool, int]], *, with_llama: bool
) -> dict[str, dict[str, float]]:
    """Figures by the way to compute. After the last token of a window nothing is known to follow."""
    expected = LlamaTwin(model, np.float64).logits_of_all(windows, [0] * len(windows))
    found: dict[str, dict[str, float]] = {}
    for way, (exact, chunk) in ways.items():
        comparison, stage = Comparison(), load(spec_of(model, threads, len(windows[0]), exact=exact))
        for window, logits in zip(windows, expected, strict=True):
            comparison.add(logits[:-1], engine_logits(stage, window, chunk)[:-1], window[1:])
        found[way] = comparison.figures()
    if with_llama:
        choices = llama_choices(model, windows, threads)
        pairs = zip(expected, choices, strict=True)
        agreed = np.concatenate([logits[:-1].argmax(axis=-1) == chosen for logits, chosen in pairs])
        found[LLAMA] = {"places": len(agreed), "top1_percent": 100 * float(agreed.mean())}
    return found


def tokens_of(model: Path, text: str, count: int) -> list[int]:
    tokens = load_tokenizer(open_checkpoint(model)).encode(text, parse_special=False, add_special=True)
    if len(tokens) < count:
        sys.exit(f"The text has {len(tokens)} tokens, and {count} are wanted; name a longer one with --text.")
    return tokens[:count]


COLUMNS: Final = {
    "top-1 %": ("top1_percent", ".2f"),
    "perplexity": ("perplexity", ".3f"),
    "twin's": ("twin_perplexity", ".3f"),
    "ratio": ("perplexity_ratio", ".5f"),
    "KL": ("mean_divergence_nats", ".1e"),
    "mean": ("logit_difference_mean", ".1e"),
    "largest": ("logit_difference_max", ".1e"),
    "gap": ("parted_gap_median", ".1e"),
    "widest gap": ("parted_gap_max", ".1e"),
}


def show(found: dict[str, dict[str, dict[str, float]]]) -> None:
    table = Table("file", "way", *COLUMNS, title="against float64: choice, perplexity, logits, gaps where they part")
    for model, ways in found.items():
        for way, figures in ways.items():
            cells = (format(figures[key], form) if key in figures else "" for key, form in COLUMNS.values())
            table.add_row(model, way, *cells)
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--window", type=int, default=500, help="tokens that are read together")
    parser.add_argument("--text", type=Path, nargs="+", default=[TEXT])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decode", action="store_true", help="also token by token")
    parser.add_argument("--llama", action="store_true", help="also llama.cpp, of the package xllamacpp")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    text = "\n".join(path.read_text() for path in options.text)
    ways = CHUNKS | (ONE_BY_ONE if options.decode else {})
    found: dict[str, dict[str, dict[str, float]]] = {}
    for model in options.models:
        token_ids = tokens_of(model, text, options.tokens)
        windows = [token_ids[start : start + options.window] for start in range(0, options.tokens, options.window)]
        found[model.stem] = compare(model, windows, options.threads, ways, with_llama=options.llama)
        print(f"{model.stem} done", file=sys.stderr, flush=True)
    if options.json:
        print(
            json.dumps({"tokens": options.tokens, "window": options.window, "threads": options.threads, "files": found})
        )
    else:
        show(found)


if __name__ == "__main__":
    main()
