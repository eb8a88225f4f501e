"""A Llama in plain NumPy over weights dequantised by the `gguf` package: slow and obvious."""

import itertools
from pathlib import Path

import gguf
import numpy as np


class LlamaTwin:
    def __init__(self, path: Path, precision: type[np.floating] = np.float32) -> None:
        """`precision`: of all that is computed; what float64 takes twice as long for is exact beside any engine."""
        self.precision = precision
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith("llama.")}
        self.layers = fields["llama.block_count"]
        self.heads = fields["llama.attention.head_count"]
        self.kv_heads = fields["llama.attention.head_count_kv"]
        self.epsilon = fields["llama.attention.layer_norm_rms_epsilon"]
        self.base = fields["llama.rope.freq_base"]
        self.position_scale = fields.get("llama.rope.scaling.factor", 1.0)
        self.weights = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            for tensor in reader.tensors
        }
        self.head_size = self.weights["blk.0.attn_q.weight"].shape[0] // self.heads

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """[tokens, vocabulary]"""
        return self.logits_of_all([token_ids], [0])[0]

    def logits_of_all(self, sequences: list[list[int]], starts: list[int]) -> list[np.ndarray]:
        """Each sequence's logits from its start on. All share the large products, which is what makes them quick."""
        bounds = list(itertools.accumulate((len(sequence) for sequence in sequences), initial=0))
        hidden = self.weights["token_embd.weight"][list(itertools.chain.from_iterable(sequences))]
        hidden = hidden.astype(self.precision)  # and so is all that follows
        for layer in range(self.layers):
            hidden = hidden + self._attention(layer, self._norm(hidden, f"blk.{layer}.attn_norm.weight"), bounds)
            normed = self._norm(hidden, f"blk.{layer}.ffn_norm.weight")
            gate = self._linear(normed, f"blk.{layer}.ffn_gate.weight")
            with np.errstate(over="ignore"):  # exp of a very negative gate: the quotient is rightly 0
                gate = gate / (1 + np.exp(-gate))
            up = self._linear(normed, f"blk.{layer}.ffn_up.weight")
            hidden = hidden + self._linear(gate * up, f"blk.{layer}.ffn_down.weight")
        normed = self._norm(hidden, "output_norm.weight")
        output = "output.weight" if "output.weight" in self.weights else "token_embd.weight"
        places = zip(itertools.pairwise(bounds), starts, strict=True)
        return [self._linear(normed[first + start : end], output) for (first, end), start in places]

    def _linear(self, values: np.ndarray, name: str) -> np.ndarray:
        return values @ self.weights[name].T

    def _norm(self, values: np.ndarray, name: str) -> np.ndarray:
        return values / np.sqrt(np.mean(values**2, axis=-1, keepdims=True) + self.epsilon) * self.weights[name]

    def _attention(self, layer: int, values: np.ndarray, bounds: list[int]) -> np.ndarray:
        query, key, value = (self._linear(values, f"blk.{layer}.attn_{name}.weight") for name in "qkv")
        parts = [self._attend(query[a:b], key[a:b], value[a:b]) for a, b in itertools.pairwise(bounds)]
        return self._linear(np.concatenate(parts), f"blk.{layer}.attn_output.weight")

    def _attend(self, query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        count = len(query)
        query = self._rotate(query.reshape(count, self.heads, -1))
        key = self._rotate(key.reshape(count, self.kv_heads, -1))
        value = value.reshape(count, self.kv_heads, -1)
        future = np.triu(np.full((count, count), -np.inf, np.float32), 1)
        outputs = []
        for head in range(self.heads):
            shared = head // (self.heads // self.kv_heads)
            scores = query[:, head] @ key[:, shared].T / np.sqrt(self.head_size) + future
            odds = np.exp(scores - scores.max(axis=-1, keepdims=True))
            outputs.append(odds / odds.sum(axis=-1, keepdims=True) @ value[:, shared])
        return np.concatenate(outputs, axis=-1)

    def _rotate(self, values: np.ndarray) -> np.ndarray:
        """Neighbouring pairs are rotated, as GGUF's permuted Llama weights want it."""
        frequencies = self.base ** (-np.arange(0, self.head_size, 2) / self.head_size)
        if "rope_freqs.weight" in self.weights:
            frequencies = frequencies / self.weights["rope_freqs.weight"]
        angles = np.outer(np.arange(len(values)) / self.position_scale, frequencies)[:, np.newaxis]
        pairs = values[..., 0::2] + 1j * values[..., 1::2]
        turned = pairs * np.exp(1j * angles)
        return np.stack((turned.real, turned.imag), axis=-1).reshape(values.shape).astype(self.precision)


def log_odds(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def divergences(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence in nats of each row of logits."""
    expected, actual = log_odds(expected), log_odds(actual)
    return (np.exp(expected) * (expected - actual)).sum(axis=-1)
