"""What a runner holds with all its slots full, against what placement sets aside for it.

    python bench/memory.py FILE.gguf ... [--context 2048] [--slots 4] [--stages 1] [--exact]
        [--kv-cache f16] [--json]

Real runner processes, linked as a node would link them, and the prediction that a leader places by. Each slot is given
a prompt that nearly fills its context, all at once, and is answered to its end. Told are the resident bytes once the
weights are loaded and at the end, their most ever (Linux), which is while they load, and what parts of the prediction
the last two are.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the harness lives with the tests

from covey.control.placement.memory import MEBIBYTE
from covey.schema.model import KvCacheType
from tests.engine.onnx.runner_memory import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--kv-cache", type=KvCacheType, choices=KvCacheType, default=KvCacheType.F32)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    columns = {"predicted": "predicted_bytes", "loaded": "loaded_bytes", "full": "full_bytes", "most": "most_bytes"}
    table = Table("file", "stage", *(f"{name} (MiB)" for name in columns), "full / predicted", "most / predicted")
    found: dict[str, list[dict[str, float]]] = {}
    for model in options.models:
        stages = measure(
            model, options.context, options.slots, options.stages, exact=options.exact, kv_cache=options.kv_cache
        )
        found[model.stem] = stages
        for index, each in enumerate(stages):
            cells = (f"{each[key] / MEBIBYTE:.0f}" for key in columns.values())
            ratios = (f"{each[key] / each['predicted_bytes']:.3f}" for key in ("full_bytes", "most_bytes"))
            table.add_row(model.stem, str(index), *cells, *ratios)
    if options.json:
        print(json.dumps({"context": options.context, "slots": options.slots, "files": found}))
    else:
        Console().print(table)


if __name__ == "__main__":
    main()
