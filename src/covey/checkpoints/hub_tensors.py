"""From the tensors of a Hugging Face folder to entries by GGUF's names, whole matrices each.

What is one matrix to us may be several tensors there: codes, scales and zeros of a quantised one, or a mixture's
experts, each by itself. Such an entry has parts, and its type says how they belong together (`hub_blocks`).
"""

import re
from collections import defaultdict
from typing import Any, Final

from msgspec import Struct, structs

from covey.checkpoints.checkpoint import FLOATS, CheckpointError, TensorEntry
from covey.checkpoints.hub_families import ENDS, Family
from covey.checkpoints.hub_quantization import Quantization, is_quantised, quantised_entry

EXPERTS_MAX: Final = 10_000
_PREFIX: Final = re.compile(r"(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.)?")
# Pictures and sounds, for which there is no graph, and frequencies that follow from the config.
_LEFT_OUT: Final = re.compile(
    r".*\.rotary_emb\.inv_freq|(?:model\.)?(?:vision_tower|multi_modal_projector|audio_tower|embed_vision)\..*"
)
_LAYER: Final = re.compile(r"layers\.(\d{1,5})\.(.+)")
_EXPERT: Final = re.compile(r"\.experts\.(\d{1,5})\.")
# How a module's tensors end. Some of gpt-oss are no module's, and end otherwise or not at all: sinks, and the experts
# in full precision, which are transposed.
_ENDING: Final = re.compile(r"(.+?)[._](weight|bias|qweight|qzeros|scales|biases|g_idx|blocks)")


class _Place(Struct, frozen=True):
    """Which of our tensors one of the folder's belongs to, and as what."""

    name: str  # behind which comes `.weight` or `.bias`; two with a slash between where rows of two alternate
    kind: str  # the ending: "weight", "scales"
    expert: int | None


def entries_of(
    tensors: dict[str, TensorEntry], family: Family, quantization: Quantization | None
) -> dict[str, TensorEntry]:
    """Raises `CheckpointError` that names the tensor that is not known, or does not belong with the others."""
    groups: defaultdict[str, dict[tuple[str, int | None], TensorEntry]] = defaultdict(dict)
    for source, tensor in tensors.items():
        if not _LEFT_OUT.fullmatch(source):
            place = _place(source, family)
            groups[place.name][place.kind, place.expert] = tensor
    found: dict[str, TensorEntry] = {}
    for name, parts in groups.items():
        found |= _of_group(name, parts, quantization)
    return found


def _place(source: str, family: Family) -> _Place:
    ending = _ENDING.fullmatch(source)
    stem, kind = (ending[1], ending[2]) if ending else (source, "transposed" if ".experts." in source else "weight")
    bare = stem[_end_of_prefix(stem) :]
    layer = _LAYER.fullmatch(bare)
    if layer is None:
        if bare not in ENDS:
            raise _unknown(source, family, list(ENDS))
        return _Place(ENDS[bare], kind, None)
    expert = _EXPERT.search(f".{layer[2]}.")
    module = _EXPERT.sub(".experts.*.", f".{layer[2]}.").strip(".")
    if module not in family.layer:
        raise _unknown(source, family, list(family.layer))
    names = "/".join(f"blk.{int(layer[1])}.{name}" for name in family.layer[module].split("/"))
    return _Place(names, kind, None if expert is None else int(expert[1]))


def _end_of_prefix(stem: str) -> int:
    match = _PREFIX.match(stem)
    return match.end() if match else 0


def _unknown(source: str, family: Family, known: list[str]) -> CheckpointError:
    return CheckpointError(
        f"it has a tensor {source!r}, which is not known of the architecture {family.architecture!r}; known in its "
        f"place are {', '.join(known)}"
    )


def _of_group(
    name: str, parts: dict[tuple[str, int | None], TensorEntry], quantization: Quantization | None
) -> dict[str, TensorEntry]:
    """The weight and the bias of one name, each of all experts."""
    experts = _expert_order(name, [expert for _, expert in parts])
    found: dict[str, TensorEntry] = {}
    each = [{kind: part for (kind, owner), part in parts.items() if owner == expert} for expert in experts]
    biases = [parts_of.pop("bias") for parts_of in each if "bias" in parts_of]
    if any(each):
        found |= _woven(f"{name}.weight", _stacked([_weight(name, of, quantization) for of in each], experts))
    if biases:
        found |= _woven(f"{name}.bias", _stacked([_plain(bias) for bias in biases], experts))
    return found


def _expert_order(name: str, owners: list[int | None]) -> list[int | None]:
    known = sorted({owner for owner in owners if owner is not None})
    if not known:
        return [None]
    if known != list(range(len(known))) or None in owners:
        raise CheckpointError(f"it lacks some of the experts of {name!r}: it has the numbers {known}")
    return [*known]


def _weight(name: str, parts: dict[str, TensorEntry], quantization: Quantization | None) -> TensorEntry:
    if is_quantised(parts):
        return quantised_entry(name, parts, quantization)
    if set(parts) == {"transposed"}:
        return _transposed(_plain(parts["transposed"]))
    if set(parts) != {"weight"}:
        raise CheckpointError(f"the tensors of {name!r} ({', '.join(sorted(parts))}) don't make a matrix")
    return _plain(parts["weight"])


def _transposed(entry: TensorEntry) -> TensorEntry:
    if len(entry.shape) != 3:  # noqa: PLR2004  # experts, columns, rows
        raise CheckpointError(f"the model is damaged: tensor {entry.name!r} measures {entry.shape}")
    experts, columns, rows = entry.shape
    part = structs.replace(entry, shape=(experts, rows, columns), is_transposed=True)
    return structs.replace(part, parts=(part,))


def _plain(entry: TensorEntry) -> TensorEntry:
    if entry.type not in FLOATS:
        known = ", ".join(FLOATS)
        raise CheckpointError(
            f"tensor {entry.name!r} is of the type {entry.type}, which can't be used; known are {known}"
        )
    if not entry.shape or 0 in entry.shape:
        raise CheckpointError(f"the model is damaged: tensor {entry.name!r} measures {entry.shape}")
    return entry


def _stacked(entries: list[TensorEntry], experts: list[int | None]) -> TensorEntry:
    """Experts one after another: [experts, rows, columns]."""
    first = entries[0]
    if experts == [None]:
        return first
    if len(entries) < len(experts) or len({(each.type, each.shape) for each in entries}) > 1:
        raise CheckpointError(f"the experts of {first.name!r} are not all of one type and shape")
    return TensorEntry(
        name=first.name,
        type=first.type,
        shape=(len(entries), *first.shape),
        offset=0,
        byte_count=sum(each.byte_count for each in entries),
        parts=tuple(part for each in entries for part in (each.parts or (each,))),
    )


def _woven(names: str, entry: TensorEntry) -> dict[str, TensorEntry]:
    """Named; if rows of two matrices alternate in it, it becomes two."""
    stem, _, ending = names.rpartition(".")
    wanted = stem.split("/")
    if len(wanted) == 1:
        return {names: structs.replace(entry, name=names)}
    return {f"{name}.{ending}": _thread(f"{name}.{ending}", entry, i, len(wanted)) for i, name in enumerate(wanted)}


def _thread(name: str, entry: TensorEntry, index: int, count: int) -> TensorEntry:
    parts = [_every(part, index, count) for part in entry.parts or (entry,)]
    return structs.replace(entry, name=name, shape=_divided(entry, count), parts=tuple(parts))


def _every(part: TensorEntry, index: int, count: int) -> TensorEntry:
    return structs.replace(part, shape=_divided(part, count), woven=(index, count))


def _divided(entry: TensorEntry, count: int) -> tuple[int, ...]:
    if len(entry.shape) < 2 or entry.shape[1] % count:  # noqa: PLR2004  # experts and rows
        raise CheckpointError(f"the model is damaged: tensor {entry.name!r} measures {entry.shape}")
    return (entry.shape[0], entry.shape[1] // count, *entry.shape[2:])


def given_entry(name: str, content: Any) -> TensorEntry:
    """A tensor of float32 numbers that no file has."""
    return TensorEntry(name, "F32", content.shape, 0, 0, given=content.astype("<f4").tobytes())
