"""What rounding keys and values in the cache does to what a model says: a twin in NumPy with and without it.

    python bench/cache_rounding.py FILE.gguf [--tokens 500] [--windows 1] [--text FILE ...] [--other FILE ...]

The twin is that of `bench/exactness.py`, in float32, and reads the opening of a story. Static scales, which is all that
`GroupQueryAttention` takes, are the largest values of each channel in another text (this project's documents) or in the
story itself. Told are the perplexity over that of the twin without rounding, in how many places both name the same next
token, and how far attention's output is off in each layer, from the same input, over its size.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from exactness import ROOT, TEXT, Comparison, tokens_of
from rich.console import Console
from rich.table import Table

from tests.engine.onnx.llama_twin import LlamaTwin

STEPS: Final = 127
Q8_0_SIZE: Final = 32  # values of a token that share a scale in llama.cpp's q8_0
OTHERS: Final = [ROOT / "docs" / "reliability.md", ROOT / "docs" / "architecture.md", ROOT / "docs" / "network.md"]

Rounding = Callable[[int, str, np.ndarray], np.ndarray]  # layer, kind; [tokens, heads, head size]


class RoundingTwin(LlamaTwin):
    """Keys (turned) and values pass through `rounding` before they are read, as they would through a cache."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, np.float32)
        self.rounding: Rounding = unrounded
        self.errors: list[float] = []  # of attention's output, of each layer: root of the mean squares over its size
        self._layer = 0

    def told(self, windows: list[list[int]], rounding: Rounding) -> list[np.ndarray]:
        """Logits of each window."""
        self.rounding, self.errors = rounding, []
        return self.logits_of_all(windows, [0] * len(windows))

    def _attention(self, layer: int, values: np.ndarray, bounds: list[int]) -> np.ndarray:
        self._layer = layer
        return super()._attention(layer, values, bounds)

    def _attend(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        count = len(query)
        query = self._rotate(query.reshape(count, self.heads, -1))
        key = self._rotate(key.reshape(count, self.kv_heads, -1))
        value = value.reshape(count, self.kv_heads, -1)
        plain = self._attended(query, key, value)
        rounded = [self.rounding(self._layer, kind, held) for kind, held in (("keys", key), ("values", value))]
        result = self._attended(query, *rounded)
        self.errors.append(float(np.sqrt(np.square(result - plain).mean() / np.square(plain).mean())))
        return result

    def _attended(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        group = self.heads // self.kv_heads
        key, value = (np.repeat(held, group, axis=1).swapaxes(0, 1) for held in (key, value))
        scores = query.swapaxes(0, 1) @ key.swapaxes(1, 2) * np.float32(self.head_size**-0.5)
        scores += np.triu(np.full(scores.shape[1:], -np.inf, np.float32), 1)
        odds = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return (odds / odds.sum(axis=-1, keepdims=True) @ value).swapaxes(0, 1).reshape(len(query), -1)


# ---- ways to round ----


def unrounded(layer: int, kind: str, values: np.ndarray) -> np.ndarray:
    del layer, kind
    return values


def halves(layer: int, kind: str, values: np.ndarray) -> np.ndarray:
    del layer, kind
    return values.astype(np.float16).astype(np.float32)


def q8_0(layer: int, kind: str, values: np.ndarray) -> np.ndarray:
    """A scale in float16 for each 32 values of a token, from their largest."""
    del layer, kind
    blocks = values.reshape(*values.shape[:-1], -1, Q8_0_SIZE)
    scales = np.abs(blocks).max(axis=-1, keepdims=True) / STEPS
    codes = np.rint(np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales != 0))
    return (codes * scales.astype(np.float16)).astype(np.float32).reshape(values.shape)


class Static:
    """Scales that were there before the text: of each channel of each head, or of all of a layer's keys or values."""

    def __init__(self, largest: dict[tuple[int, str], np.ndarray], room: float, *, of_channels: bool) -> None:
        self.clipped = self.count = 0
        self._largest, self._room, self._of_channels = largest, room, of_channels

    def __call__(self, layer: int, kind: str, values: np.ndarray) -> np.ndarray:
        largest = self._largest[layer, kind]
        scales = (largest if self._of_channels else largest.max()) * np.float32(self._room / STEPS)
        codes = np.rint(values / scales)
        self.clipped += int((np.abs(codes) > STEPS + 0.5).sum())
        self.count += codes.size
        return np.clip(codes, -STEPS - 1, STEPS) * scales


class Largest:
    """Looks at what passes, and leaves it as it is."""

    def __init__(self, first: int) -> None:
        """`first`: the first token that counts."""
        self.found: dict[tuple[int, str], np.ndarray] = {}
        self._first = first

    def __call__(self, layer: int, kind: str, values: np.ndarray) -> np.ndarray:
        largest = np.abs(values[self._first :]).max(axis=0)
        self.found[layer, kind] = np.maximum(largest, self.found.get((layer, kind), 0.0))
        return values


def ways(twin: RoundingTwin, own: list[list[int]], other: list[list[int]]) -> dict[str, Rounding]:
    seen = {name: largest_of(twin, text, first) for name, text, first in (("own", own, 0), ("other", other, 0))}
    later = largest_of(twin, other, 1)
    return {
        "float16": halves,
        "q8_0: a scale for 32 values of a token": q8_0,
        "static, of channels, this text's": Static(seen["own"], 1.0, of_channels=True),
        "static, of channels, another text's": Static(seen["other"], 1.0, of_channels=True),
        "the same, and a quarter of room": Static(seen["other"], 1.25, of_channels=True),
        "the same, a half": Static(seen["other"], 1.5, of_channels=True),
        "the same, twice": Static(seen["other"], 2.0, of_channels=True),
        "the same, four times": Static(seen["other"], 4.0, of_channels=True),
        "another text's without its first token": Static(later, 1.0, of_channels=True),
        "static, of a layer, another text's": Static(seen["other"], 1.0, of_channels=False),
    }


def largest_of(twin: RoundingTwin, windows: list[list[int]], first: int) -> dict[tuple[int, str], np.ndarray]:
    looking = Largest(first)
    twin.told(windows, looking)
    return looking.found


def windows_of(model: Path, text: str, tokens: int, count: int) -> list[list[int]]:
    """Windows that follow each other, the first with the token that begins a text."""
    found = tokens_of(model, text, tokens * count)
    return [found[start : start + tokens] for start in range(0, len(found), tokens)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=500, help="of a window")
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--text", type=Path, nargs="+", default=[TEXT], help="that is read")
    parser.add_argument("--other", type=Path, nargs="+", default=OTHERS, help="that scales are made for")
    options = parser.parse_args()
    own, other = (
        windows_of(options.model, "\n".join(path.read_text() for path in paths), options.tokens, options.windows)
        for paths in (options.text, options.other)
    )
    twin = RoundingTwin(options.model)
    expected = twin.told(own, unrounded)
    table = Table(
        "cache", "perplexity ratio", "top-1 %", "KL (nats)", "attention off by, mean", "worst layer", "clipped"
    )
    for name, rounding in ways(twin, own, other).items():
        comparison = Comparison()
        for window, plain, rounded in zip(own, expected, twin.told(own, rounding), strict=True):
            comparison.add(plain[:-1], rounded[:-1], window[1:])
        figures = comparison.figures()
        clipped = f"{rounding.clipped / rounding.count:.1e}" if isinstance(rounding, Static) else ""
        table.add_row(
            name, f"{figures['perplexity_ratio']:.5f}", f"{figures['top1_percent']:.2f}",
            f"{figures['mean_divergence_nats']:.1e}", f"{np.mean(twin.errors):.2%}", f"{max(twin.errors):.2%}", clipped,
        )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
