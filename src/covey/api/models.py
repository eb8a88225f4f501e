"""The list of models: OpenAI's, with the fields that exo's clients read. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any

from covey.api.backend import ListedModel
from covey.api.cluster_objects import can_be_shared
from covey.api.errors import MODEL_NOT_FOUND, RequestError
from covey.checkpoints import mistaken
from covey.schema.cluster import Instance

STATUSES = ("downloaded",)


def render_models(
    models: Iterable[ListedModel], placed: Sequence[Instance], created_s: int, status: str | None = None
) -> dict[str, Any]:
    """`status` "downloaded" keeps those whose file is here. Raises `RequestError` for another."""
    if status is not None and status not in STATUSES:
        raise RequestError(f"The parameter 'status' must be 'downloaded', and was '{status}'.", param="status")
    chosen = [model for model in models if status is None or model.on_disk]
    return {"object": "list", "data": [render_model(model, placed, created_s) for model in chosen]}


def find_model(models: Sequence[ListedModel], name: str) -> ListedModel:
    """In either case of letters, as requests may name it; else as it is written. Raises `RequestError` 404."""
    found = [model for model in models if model.card.model_id.lower() == name.lower()]
    if not found:
        known = [model.card.model_id for model in models]
        sentence = f"There is no model '{name}'{mistaken.guess(name, known)}; listed are: {', '.join(known)}."
        raise RequestError(sentence, status=404, param="model", code=MODEL_NOT_FOUND)
    return min(found, key=lambda model: model.card.model_id != name)


def render_model(model: ListedModel, placed: Sequence[Instance], created_s: int) -> dict[str, Any]:
    """Its context is the largest of its instances among those `placed`; the model's own where there is none."""
    card = model.card
    served = [each.context_length for each in placed if each.card.model_id == card.model_id]
    return {
        "id": card.model_id,
        "object": "model",
        "created": created_s,
        "owned_by": "covey",
        "hugging_face_id": card.model_id,
        "name": card.model_id,
        "description": f"{card.layer_count} layers, {card.quantization}",
        "context_length": max(served, default=card.context_length_max),
        "tags": [],
        "storage_size_megabytes": card.file_bytes // 1024**2,  # exo's megabytes
        "file_bytes": card.file_bytes,
        "supports_tensor": can_be_shared(card),
        "tasks": ["TextGeneration"],
        "is_custom": False,
        "family": card.architecture,
        "quantization": card.quantization,
        "base_model": card.model_id,
        "capabilities": ["text"],
        "reasoning_dialect": None,
        "downloaded": model.on_disk,
    }
