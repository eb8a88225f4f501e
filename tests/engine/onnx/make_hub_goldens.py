"""Writes `goldens/hub.json`: the config and the tensors' names of each family, as transformers saves them in a folder.

It needs what `make_family_goldens.py` needs, and runs as it does.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import transformers
from make_family_goldens import CONFIGS, GOLDENS, config, state
from safetensors import safe_open
from tiny_families import FAMILIES


def saved(family: str) -> dict[str, Any]:
    kind, changes = CONFIGS[family]
    model = getattr(transformers, f"{kind}ForCausalLM")(config(FAMILIES[family], kind, changes))
    model.load_state_dict(state(FAMILIES[family]), strict=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(f"{folder}/model.safetensors", "np") as file:
            shapes = {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
        return {"config": json.loads(Path(folder, "config.json").read_text()), "shapes": shapes}


if __name__ == "__main__":
    lines = [f"{json.dumps(family)}: {json.dumps(saved(family))}" for family in FAMILIES]
    (GOLDENS / "hub.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
