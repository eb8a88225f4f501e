"""Which of a folder's tensors make one quantised matrix, as its config says: MLX's, AWQ's, GPTQ's, or OCP's MXFP4.

What their bits mean is `hub_blocks`' knowledge; here is only how they have to measure.
"""

from typing import Any, Final

from msgspec import Struct

from covey.checkpoints.checkpoint import FLOATS, CheckpointError, TensorEntry

WORD_BITS: Final = 32
MLX_BITS: Final = (2, 3, 4, 5, 6, 8)
MLX_GROUPS: Final = (32, 64, 128)
MX_GROUP: Final = 32
METHODS: Final = ("awq", "gptq", "mxfp4")


class Quantization(Struct, frozen=True):
    """`method`: "mlx" or one of `METHODS`."""

    method: str
    bits: int
    group_size: int  # weights of a row that share a scale; -1 where all do
    overrides: dict[str, Any] = {}  # of single modules, by their names in the file


def read_quantization(config: dict[str, Any]) -> Quantization | None:
    """What the config says, if anything. Raises `CheckpointError` for what is not known, with what is."""
    mlx = config.get("quantization")
    if isinstance(mlx, dict) and "group_size" in mlx:
        return _mlx(mlx)
    stated = config.get("quantization_config")
    if stated is None:
        return None
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    if method not in METHODS:
        raise CheckpointError(
            f"its config.json says that it is quantised by {method!r}; known are {', '.join(METHODS)} and MLX's"
        )
    if method == "mxfp4":
        return Quantization("mxfp4", 4, MX_GROUP)
    return _awq_or_gptq(method, stated)


def _mlx(stated: dict[str, Any]) -> Quantization:
    mode = stated.get("mode", "affine")
    if mode not in {"affine", "mxfp4"}:
        raise CheckpointError(
            f"its config.json says that MLX quantised it in the mode {mode!r}; known are affine, mxfp4"
        )
    overrides = {name: value for name, value in stated.items() if isinstance(value, dict)}
    return Quantization("mlx", _whole(stated, "bits"), _whole(stated, "group_size"), overrides)


def _awq_or_gptq(method: str, stated: dict[str, Any]) -> Quantization:
    bits, group_size = _whole(stated, "bits"), _whole(stated, "group_size")
    if bits != 4:  # noqa: PLR2004  # the formats know others, which are rare
        raise CheckpointError(f"its config.json says that {method} quantised it to {bits} bits; only 4 are known")
    version = str(stated.get("version", "gemm")).lower()
    if method == "awq" and version != "gemm":
        raise CheckpointError(f"its config.json says that awq stored it for {version!r}; only 'gemm' is known")
    if stated.get("desc_act"):
        raise CheckpointError(
            "its config.json says that gptq reordered its columns (desc_act), which can't be computed in blocks; "
            "take a version without it"
        )
    is_second = stated.get("checkpoint_format") == "gptq_v2"
    return Quantization("gptq_v2" if is_second else method, bits, group_size)


def _whole(stated: dict[str, Any], key: str) -> int:
    value = stated.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and (key, value) != ("group_size", -1)):
        raise CheckpointError(f"its config.json gives {key!r} of its quantization as {value!r}")
    return value


def is_quantised(parts: dict[str, TensorEntry]) -> bool:
    return "qweight" in parts or "scales" in parts


def quantised_entry(name: str, parts: dict[str, TensorEntry], quantization: Quantization | None) -> TensorEntry:
    """Raises `CheckpointError` where the parts are not those of the method, or don't fit one another."""
    if quantization is None:
        raise CheckpointError(f"{name!r} is quantised, but the config.json does not say how")
    kinds = set(parts)
    if kinds == {"blocks", "scales"}:
        return _mxfp4_blocks(name, parts)
    if kinds == {"weight", "scales"} and quantization.method == "mlx":
        return _mxfp4_words(name, parts)
    if kinds == {"weight", "scales", "biases"} and quantization.method == "mlx":
        return _mlx_entry(name, parts, quantization)
    if kinds == {"qweight", "qzeros", "scales"} and quantization.method == "awq":
        return _awq_entry(name, parts, quantization)
    if kinds - {"g_idx"} == {"qweight", "qzeros", "scales"} and quantization.method.startswith("gptq"):
        return _gptq_entry(name, parts, quantization)
    raise CheckpointError(
        f"the tensors of {name!r} ({', '.join(sorted(kinds))}) are not those of a matrix quantised by "
        f"{quantization.method}"
    )


def _mlx_entry(name: str, parts: dict[str, TensorEntry], quantization: Quantization) -> TensorEntry:
    weight, scales, biases = parts["weight"], parts["scales"], parts["biases"]
    own = quantization.overrides.get(weight.name.removesuffix(".weight"), {})
    bits, group_size = own.get("bits", quantization.bits), own.get("group_size", quantization.group_size)
    if bits not in MLX_BITS or group_size not in MLX_GROUPS:
        raise CheckpointError(
            f"{name!r} has {bits} bits in groups of {group_size}; known of MLX are {_listed(MLX_BITS)} bits in groups "
            f"of {_listed(MLX_GROUPS)}"
        )
    columns = scales.shape[-1] * group_size if scales.shape else 0
    shape = (*weight.shape[:-1], columns)
    _expect(weight, ("U32",), (*shape[:-1], columns * bits // WORD_BITS))
    _expect(scales, FLOATS, (*shape[:-1], columns // group_size))
    _expect(biases, (scales.type,), scales.shape)
    return _joined(name, f"MLX_{bits}", shape, (weight, scales, biases))


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def _mxfp4_words(name: str, parts: dict[str, TensorEntry]) -> TensorEntry:
    weight, scales = parts["weight"], parts["scales"]
    shape = (*scales.shape[:-1], scales.shape[-1] * MX_GROUP) if scales.shape else ()
    _expect(weight, ("U32",), (*shape[:-1], shape[-1] * 4 // WORD_BITS) if shape else ())
    _expect(scales, ("U8",), scales.shape)
    return _joined(name, "MXFP4_PAIRS", shape, (weight, scales))


def _mxfp4_blocks(name: str, parts: dict[str, TensorEntry]) -> TensorEntry:
    """gpt-oss: [experts, rows, blocks, 16 bytes] and [experts, rows, blocks]."""
    blocks, scales = parts["blocks"], parts["scales"]
    _expect(blocks, ("U8",), (*scales.shape, MX_GROUP // 2))
    _expect(scales, ("U8",), scales.shape)
    return _joined(name, "MXFP4_PAIRS", (*scales.shape[:-1], scales.shape[-1] * MX_GROUP), (blocks, scales))


def _awq_entry(name: str, parts: dict[str, TensorEntry], quantization: Quantization) -> TensorEntry:
    """Codes lie [columns in, rows out / 8], scales [groups, rows out]."""
    codes, zeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    rows, columns, groups = _sizes(name, scales, codes.shape[:1], quantization.group_size)
    _expect(codes, ("I32",), (columns, rows // 8))
    _expect(zeros, ("I32",), (groups, rows // 8))
    return _joined(name, "AWQ_4", (rows, columns), (codes, zeros, scales))


def _gptq_entry(name: str, parts: dict[str, TensorEntry], quantization: Quantization) -> TensorEntry:
    """Codes lie [columns in / 8, rows out], zeros [groups, rows out / 8], scales [groups, rows out]."""
    codes, zeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    stated = tuple(8 * size for size in codes.shape[:1])
    rows, columns, groups = _sizes(name, scales, stated, quantization.group_size)
    _expect(codes, ("I32",), (columns // 8, rows))
    _expect(zeros, ("I32",), (groups, rows // 8))
    order = (parts["g_idx"],) if "g_idx" in parts else ()
    for each in order:
        _expect(each, ("I32",), (columns,))
    kind = "GPTQ_V2_4" if quantization.method == "gptq_v2" else "GPTQ_4"
    return _joined(name, kind, (rows, columns), (codes, zeros, scales, *order))


def _sizes(name: str, scales: TensorEntry, columns: tuple[int, ...], group_size: int) -> tuple[int, int, int]:
    """Rows, columns and groups."""
    if len(scales.shape) != 2 or len(columns) != 1 or 0 in (*scales.shape, *columns):  # noqa: PLR2004  # a matrix
        raise CheckpointError(f"the model is damaged: the scales of {name!r} measure {scales.shape}")
    groups, rows = scales.shape
    expected = columns[0] if group_size == -1 else group_size
    if groups * expected != columns[0] or rows % 8:
        raise CheckpointError(
            f"{name!r} has {groups} groups for {columns[0]} columns and {rows} rows; its config.json says that groups "
            f"have {group_size} columns, and rows have to be a multiple of 8"
        )
    _expect(scales, FLOATS, scales.shape)
    return rows, columns[0], groups


def _expect(entry: TensorEntry, types: tuple[str, ...], shape: tuple[int, ...]) -> None:
    if entry.type not in types or entry.shape != shape or not shape or 0 in shape:
        raise CheckpointError(
            f"the model is damaged: tensor {entry.name!r} of {entry.type} measures {entry.shape}, where "
            f"{' or '.join(types)} and {shape} belong to the rest"
        )


def _joined(name: str, kind: str, shape: tuple[int, ...], parts: tuple[TensorEntry, ...]) -> TensorEntry:
    return TensorEntry(name, kind, shape, 0, sum(part.byte_count for part in parts), parts=parts)
