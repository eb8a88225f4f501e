"""A folder of each family, with the config and the names that transformers gives it, says what transformers says to it.

`make_hub_goldens.py` wrote down configs, names and shapes, `make_family_goldens.py` the logits.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_families
from test_families import Pipeline, expect_golden, piece
from tiny_families import FAMILIES, TOKENS, Tiny, unpermuted

from covey.checkpoints.hub_config import family_of
from covey.checkpoints.hub_families import ENDS
from tests.checkpoints.hub_folders import write_folder

SAVED = json.loads((Path(__file__).parent / "goldens" / "hub.json").read_text())


def as_saved(tiny: Tiny, name: str, content: np.ndarray) -> dict[str, np.ndarray]:
    """One of GGUF's tensors as a folder has it, which may be in parts; a half of gpt-oss' joined ones is not said."""
    content = unpermuted(tiny, name, content)
    if tiny.architecture.startswith("gemma") and name.endswith("norm.weight"):
        content = content - 1
    if not name.startswith("blk."):
        stem = next(theirs for theirs, ours in ENDS.items() if name == f"{ours}.weight")
        return {f"{'' if stem == 'lm_head' else 'model.'}{stem}.weight": content}
    _, layer, module, kind = name.split(".")
    modules = family_of(SAVED[tiny_name(tiny)]["config"]).layer
    theirs = next(theirs for theirs, ours in modules.items() if ours == module and "switch_mlp" not in theirs)
    stem = f"model.layers.{layer}.{theirs}"
    if "*" in stem:
        return {f"{stem.replace('*', str(index))}.{kind}": each for index, each in enumerate(content)}
    if module == "attn_sinks":
        return {stem: content}
    if module.endswith("_exps"):  # gpt-oss
        return {f"{stem}_bias": content} if kind == "bias" else {stem: content.swapaxes(1, 2)}
    return {f"{stem}.{kind}": content}


def tiny_name(tiny: Tiny) -> str:
    return next(name for name, each in FAMILIES.items() if each is tiny)


def joined(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gate and up of gpt-oss, whose columns alternate."""
    found = dict(tensors)
    for name in [name for name in found if re.search(r"experts\.gate_proj(_bias)?$", name)]:
        gate, up = found.pop(name), found.pop(name.replace("gate_proj", "up_proj"))
        found[name.replace("gate_proj", "gate_up_proj")] = np.stack((gate, up), -1).reshape(*gate.shape[:-1], -1)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_says_what_transformers_says_to_it(family, tmp_path):
    tiny, saved = FAMILIES[family], SAVED[family]
    tensors: dict[str, np.ndarray] = {}
    for name, content in tiny_families.tensors(tiny).items():
        if name not in tiny.factors:
            tensors |= as_saved(tiny, name, content)
    tensors = joined(tensors)
    assert {name: list(each.shape) for name, each in tensors.items()} == saved["shapes"]
    folder = write_folder(tmp_path / "model", saved["config"], tensors)
    expect_golden(family, Pipeline(folder, tiny.layers).run(piece(0, 0, TOKENS)), [TOKENS - 1])
    expect_golden(family, Pipeline(folder, tiny.layers, 1, exact=True).run(piece(0, 0, TOKENS)), [TOKENS - 1])
