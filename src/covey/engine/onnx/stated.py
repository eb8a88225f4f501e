"""Takes what a header's metadata states about an architecture, by the keys of the GGUF specification.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; keys are given without the architecture's name before them.
"""

from typing import Any, Final

from covey.checkpoints.checkpoint import Checkpoint, CheckpointError

REQUIRED: Final = object()


class Stated:
    def __init__(self, header: Checkpoint, architecture: str) -> None:
        self.architecture = architecture
        self._header = header

    def count(self, key: str, default: Any = REQUIRED) -> Any:
        """A whole number above 0; some files state it for each layer. Raises `CheckpointError`, as all here do."""
        return self._number(key, int, default)

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """A number above 0."""
        return self._number(key, float, default)

    def flag(self, key: str, *, default: bool) -> bool:
        value: Any = self._value(key, default)
        if not isinstance(value, bool):
            raise self._damaged(key, value)
        return value

    def own_flag(self, key: str, *, default: bool) -> bool:
        """Of a key that is no architecture's."""
        value: Any = self._header.metadata.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"the model file is damaged: its metadata gives {key} as {value!r}")
        return value

    def own_number(self, key: str, default: float) -> float:
        value: Any = self._header.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(f"the model file is damaged: its metadata gives {key} as {value!r}")
        return float(value)

    def own_flags(self, key: str, length: int) -> tuple[bool, ...] | None:
        """One for each of `length` layers; None where it is not stated."""
        value: Any = self._header.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length or {type(each) for each in value} != {bool}:
            raise CheckpointError(f"the model file is damaged: its metadata gives {key} as {value!r}")
        return tuple(value)

    def text(self, key: str, default: str) -> str:
        value: Any = self._value(key, default)
        if not isinstance(value, str):
            raise self._damaged(key, value)
        return value

    def positive_list(self, key: str) -> tuple[float, ...] | None:
        """A list of numbers above 0; None where it is not stated."""
        value: Any = self._value(key, None)
        if value is None:
            return None
        if not isinstance(value, list) or not all(_is_number(each) and each > 0 for each in value):
            raise self._damaged(key, value)
        return tuple(float(each) for each in value)

    def flags_or_count(self, key: str, length: int, default: int) -> tuple[bool, ...] | int:
        """One flag for each of `length` layers, or a whole number."""
        value: Any = self._value(key, default)
        if isinstance(value, list) and len(value) == length and all(isinstance(each, (bool, int)) for each in value):
            return tuple(bool(each) for each in value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._damaged(key, value)
        return value

    def states(self, key: str) -> bool:
        """Whether the key has a value that says something: 0 stands for "none" in many files."""
        return bool(self._value(key, None))

    def has_tensor(self, name: str) -> bool:
        return name in self._header.tensors

    def _value(self, key: str, default: Any) -> Any:
        return self._header.metadata.get(f"{self.architecture}.{key}", default)

    def _number(self, key: str, kind: type[Any], default: Any) -> Any:
        found = self._value(key, None if default is REQUIRED else default)
        if found is None and default is None:
            return None
        repeated: list[Any] = found if isinstance(found, list) else [found]
        value: Any = repeated[0] if repeated and repeated.count(repeated[0]) == len(repeated) else None
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
            raise self._damaged(key, value)
        return value

    def _damaged(self, key: str, value: object) -> CheckpointError:
        name = f"{self.architecture}.{key}"
        if name not in self._header.metadata:
            return CheckpointError(
                f"the model file lacks {name!r} in its metadata, so it is no complete language model"
            )
        return CheckpointError(f"the model file is damaged: its metadata gives {name} as {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
