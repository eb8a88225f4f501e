"""What one rank of a stage has of every tensor: whole rows of most matrices, columns of those whose products add up."""

from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from covey.checkpoints.checkpoint import EMBEDDING, OUTPUT, Checkpoint, CheckpointError, TensorEntry
from covey.checkpoints.quantization import form_of
from covey.checkpoints.quantizing import BLOCK_SIZE, can_be_quantized
from covey.checkpoints.ranks import COLUMNS, Heads, kv_heads, portion, query_heads, refusal
from covey.engine.contract import EngineError
from covey.engine.onnx.architecture import Architecture

ADDED_UP: Final = ("attn_output", "ffn_down", "ffn_down_exps")  # each rank has columns of these


class Cut(Struct, frozen=True):
    """Of a matrix [rows out, columns in], or of each of several. None stands for all."""

    rows: tuple[range, ...] | None = None
    columns: range | None = None


WHOLE: Final = Cut()


class Share:
    """`rank` of `count`. Raises `EngineError` where the model can't be cut so."""

    def __init__(
        self, header: Checkpoint, architecture: Architecture, rank: int = 0, count: int = 1, bits: int | None = None
    ) -> None:
        """`bits`: what matrices in full precision are rounded to, in blocks."""
        self._header = header
        self._architecture = architecture
        self._rank, self._count = rank, count
        self._bits = bits
        self._heads = heads = Heads(architecture.head_count, architecture.kv_head_count, architecture.head_size)
        self.is_whole = count == 1
        if not self.is_whole and (reason := refusal(architecture.name, heads, self._smallest_inner(), count)):
            raise EngineError(f"{reason}; place it again")
        self.query_heads = query_heads(heads, rank, count)
        self.kv_heads = kv_heads(heads, rank, count)
        self.architecture = replace(architecture, head_count=len(self.query_heads), kv_head_count=len(self.kv_heads))

    def of(self, name: str) -> Cut:
        """Of a layer's matrix or bias. Raises `CheckpointError`."""
        if self.is_whole or not name.startswith("blk."):
            return WHOLE
        _, layer, kind, _ = name.split(".")
        if kind in ADDED_UP:
            return Cut(columns=self._queries() if kind == "attn_output" else self._inner(layer))
        if kind.startswith("ffn_") and "norm" not in kind and kind != "ffn_gate_inp":
            return Cut(rows=self._inner_rows(layer, kind))
        rows = self._attention_rows(kind)
        return WHOLE if rows is None else Cut(rows=rows)

    def of_output(self, name: str) -> Cut:
        """Of the rows that give logits; `name` may be the embedding's."""
        assert name in {OUTPUT, EMBEDDING}
        if self.is_whole:
            return WHOLE
        return Cut(rows=(portion(self._header.tensors[name].shape[0], COLUMNS, self._rank, self._count),))

    def has_bias(self, name: str) -> bool:
        """Whether this rank adds the bias `name`: where products add up, only the first one does."""
        return self._rank == 0 or name.split(".")[2] not in ADDED_UP

    def _queries(self) -> range:
        return _times(self.query_heads, self._architecture.head_size)

    def _attention_rows(self, kind: str) -> tuple[range, ...] | None:
        architecture = self._architecture
        query, key = self._queries(), _times(self.kv_heads, architecture.head_size)
        if kind == "attn_qkv":
            key_start, value_start = architecture.query_size, architecture.query_size + architecture.kv_size
            return query, _moved(key, key_start), _moved(key, value_start)
        return {"attn_q": (query,), "attn_k": (key,), "attn_v": (key,)}.get(kind)

    def _inner_rows(self, layer: str, kind: str) -> tuple[range, ...]:
        inner, size = self._inner(layer), self._down(layer).shape[-1]
        is_joined = self._architecture.is_joined and kind == "ffn_up"
        entry = self._header.tensors[f"blk.{layer}.{kind}.weight"]
        if entry.shape[-2] != size * (1 + is_joined):
            raise CheckpointError(f"the model file is damaged: tensor {entry.name!r} measures {entry.shape}")
        return (inner, _moved(inner, size)) if is_joined else (inner,)

    def _inner(self, layer: str) -> range:
        """At borders of blocks, unless there are fewer blocks than ranks."""
        down = self._down(layer)
        form, size = form_of(down), down.shape[-1]
        if self._bits is not None and can_be_quantized(down):
            unit = BLOCK_SIZE
        else:
            unit = COLUMNS if form is None else form.block_size
        return portion(size, unit if size >= unit * self._count else COLUMNS, self._rank, self._count)

    def _down(self, layer: str) -> TensorEntry:
        kind = "ffn_down" if self._architecture.experts is None else "ffn_down_exps"
        name = f"blk.{layer}.{kind}.weight"
        if name not in self._header.tensors:
            raise CheckpointError(f"the model file lacks its tensor {name!r}; it may be of an unknown kind")
        return self._header.tensors[name]

    def _smallest_inner(self) -> int:
        return min(self._down(str(layer)).shape[-1] for layer in range(self._architecture.layer_count))


def _times(heads: range, size: int) -> range:
    return range(heads.start * size, heads.stop * size)


def _moved(places: range, by: int) -> range:
    return range(places.start + by, places.stop + by)
