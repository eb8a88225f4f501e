"""Golden text: a conversation as somebody last read it. `COVEY_UPDATE_GOLDEN=1` rewrites the files."""

import os
from pathlib import Path


def check(path: Path, text: str) -> None:
    """Compares `text` with the file, or writes it there when asked to; a missing file is a failure."""
    if os.environ.get("COVEY_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"{path.name} is missing: run with COVEY_UPDATE_GOLDEN=1 and read what it wrote"
    assert text == path.read_text(encoding="utf-8")
