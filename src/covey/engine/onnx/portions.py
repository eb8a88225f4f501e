"""Which layers of a stage become one graph each.

Where ONNX Runtime packs the weights of a graph itself (`kernel_file` says where not), what they are packed from is
still there. So a stage is several graphs then, loaded one after another: only one of them is there twice at a time.
What that costs a token is told by `bench/segments.py`; and a tied embedding is read twice.
"""

from typing import Final

from covey.checkpoints.checkpoint import EMBEDDING, Checkpoint
from covey.engine.onnx import kernel_file
from covey.engine.onnx.architecture import Architecture
from covey.engine.onnx.tensors import output_name
from covey.schema.model import Shard

GRAPHS: Final = 8  # about as many has a large stage; what it holds twice while it loads is so much smaller
GRAPH_BYTES_MIN: Final = 48 * 1024 * 1024  # of the file: what a graph costs a token shows in small models
EXPERTS_MAX: Final = 512  # in one graph; ONNX Runtime takes 1 s to load their branches, and 90 s for those of 6,000


def portions(header: Checkpoint, architecture: Architecture, shard: Shard, *, packs_itself: bool) -> list[Shard]:
    """In the order in which they are to be loaded: the largest first, since while it is there twice, the others are not
    there yet.
    """
    sizes = _file_bytes(header, shard)
    total = sum(sizes.values())
    is_one = not packs_itself and kernel_file.has_room(total)
    bytes_most = total if is_one else max(total // GRAPHS, GRAPH_BYTES_MIN)
    layers_most = _layers_most(architecture)
    starts: list[int] = []
    size = 0
    for layer in range(shard.layer_start, shard.layer_end):
        if not starts or layer - starts[-1] == layers_most or size + sizes[layer] > bytes_most:
            starts.append(layer)
            size = 0
        size += sizes[layer]
    ranges = zip(starts, [*starts[1:], shard.layer_end], strict=True)
    found = [Shard(start, end, shard.layer_count) for start, end in ranges]
    return sorted(found, key=lambda each: -sum(sizes[layer] for layer in range(each.layer_start, each.layer_end)))


def _layers_most(architecture: Architecture) -> int:
    experts = architecture.experts
    return architecture.layer_count if experts is None else max(EXPERTS_MAX // experts.count, 1)


def _file_bytes(header: Checkpoint, shard: Shard) -> dict[int, int]:
    """Of each layer; the first one counts the embedding, and the last one the output."""
    sizes = dict.fromkeys(range(shard.layer_start, shard.layer_end), 0)
    for name, entry in header.tensors.items():
        layer = int(name.split(".", 2)[1]) if name.startswith("blk.") else -1
        if layer in sizes:
            sizes[layer] += entry.byte_count
    if shard.layer_start == 0:
        sizes[0] += header.tensors[EMBEDDING].byte_count
    if shard.layer_end == shard.layer_count:
        sizes[shard.layer_end - 1] += header.tensors[output_name(header)].byte_count
    return sizes
