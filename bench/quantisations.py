"""Writes a small Llama again in every quantisation that the engine knows, for `exactness.py` to compare.

    python bench/quantisations.py FILE.gguf FOLDER [--llama-quantize PATH] [--only Q8_0 Q2_K ...]

The weights are those of FILE dequantised, so what is lost against FILE is lost in the file that is written, and both
the engine and its twin read that. Types of blocks of 256 weights need llama.cpp's `llama-quantize`, and rows that
divide by 256: the model is widened with zeros until they do, which changes none of its answers.
"""

import argparse
import math
import subprocess
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np

PLAIN: Final = ("F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "MXFP4")
BY_LLAMA: Final = {
    "Q2_K": "Q2_K",
    "Q3_K": "Q3_K_S",
    "Q4_K": "Q4_K_S",
    "Q5_K": "Q5_K_S",
    "Q6_K": "Q6_K",
    "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS",
}  # by what llama-quantize calls the mixture that is all of this type, if it is told to be pure
SUPER_BLOCK: Final = 256
QUANTIZE_SECONDS_MAX: Final = 1800


class Llama:
    """A file's metadata, and its weights as float32."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields = {
            key: (field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.") and key != "general.architecture"
        }
        self.tensors = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            for tensor in reader.tensors
        }

    def stated(self, key: str) -> Any:
        return self.fields[f"llama.{key}"][0]

    def state(self, key: str, value: Any, kind: gguf.GGUFValueType) -> None:
        self.fields[f"llama.{key}"] = (value, kind, None)

    def widen(self) -> None:
        """Zeros around each matrix. The mean of squares of a wider row is smaller, which the norms make up for."""
        hidden, heads, kv_heads = (
            self.stated(key) for key in ("embedding_length", "attention.head_count", "attention.head_count_kv")
        )
        head = hidden // heads
        wider = round_up(hidden, SUPER_BLOCK)
        more_kv_heads = round_up(kv_heads, SUPER_BLOCK // math.gcd(SUPER_BLOCK, heads // kv_heads * head))
        more_heads = heads // kv_heads * more_kv_heads
        sizes = {hidden: wider, heads * head: more_heads * head, kv_heads * head: more_kv_heads * head}
        shrunk = hidden / wider
        for name, values in self.tensors.items():
            wide = np.zeros([sizes.get(size, size) for size in values.shape], np.float32)
            wide[tuple(slice(size) for size in values.shape)] = values * (math.sqrt(shrunk) if values.ndim == 1 else 1)
            self.tensors[name] = wide
        integer, real = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32
        self.state("embedding_length", wider, integer)
        self.state("attention.head_count", more_heads, integer)
        self.state("attention.head_count_kv", more_kv_heads, integer)
        for key in ("attention.key_length", "attention.value_length"):
            self.state(key, head, integer)
        epsilon = self.stated("attention.layer_norm_rms_epsilon") * shrunk
        self.state("attention.layer_norm_rms_epsilon", epsilon, real)

    def write(self, path: Path, type_name: str) -> None:
        """All matrices in one type."""
        writer = gguf.GGUFWriter(path, "llama")
        for key, (value, kind, inner) in self.fields.items():
            writer.add_key_value(key, value, kind, sub_type=inner)
        for name, values in self.tensors.items():
            kind = gguf.GGMLQuantizationType["F32" if values.ndim == 1 else type_name]
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def write_by_llama(model: Llama, folder: Path, names: list[str], program: Path) -> None:
    model.widen()
    wide = folder / "wide.F32.gguf"
    model.write(wide, "F32")
    for name in names:
        command = [program, "--pure", wide, folder / f"{name}.gguf", BY_LLAMA[name], "1"]
        subprocess.run(command, check=True, capture_output=True, timeout=QUANTIZE_SECONDS_MAX)
    wide.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama-quantize", type=Path)
    parser.add_argument("--only", nargs="+", choices=(*PLAIN, *BY_LLAMA), default=(*PLAIN, *BY_LLAMA))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    model = Llama(options.model)
    for name in options.only:
        if name in PLAIN:
            model.write(options.folder / f"{name}.gguf", name)
    if options.llama_quantize is not None:
        names = [name for name in options.only if name in BY_LLAMA]
        write_by_llama(model, options.folder, names, options.llama_quantize)
    print("\n".join(sorted(str(path) for path in options.folder.glob("*.gguf"))))


if __name__ == "__main__":
    main()
