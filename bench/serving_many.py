"""Many requests at once through HTTP against llama.cpp's `llama-server`, on the same files in turn: `covey bench`.

    python bench/serving_many.py FILE.gguf [FILE.gguf ...] --llama-server PATH [--requests 8] [--rounds 5] [--json FILE]

Each file is served by a node of its own with a slot for every request, and by `llama-server --parallel REQUESTS` with
as many threads. Each round asks both the same prompts, one after the other. The worst file is what the documents quote.
"""

import argparse
import json
import sys
from pathlib import Path

from one_node import serving

from covey.cli.benching.figures import Case
from covey.cli.benching.measuring import Plan
from covey.cli.benching.running import Asked, Measured, Rival, run
from covey.cli.benching.showing import comparison, report
from covey.cli.client import CliError
from covey.cli.demo import ends_by_signal

SPARE_TOKENS = 128  # prompts are as long as was asked for, or a little longer


def measure(model: Path, case: Case, rounds: int, rival: Rival) -> Measured:
    context_length = case.prompt_tokens + case.new_tokens + SPARE_TOKENS
    with serving(model, slots=case.concurrency, context_length=context_length) as node:
        return run(node, Asked(model=None, plan=Plan((case,), repeats=rounds, warm_ups=1), rival=rival))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="FILE.gguf")
    parser.add_argument("--llama-server", type=Path, help="default: the one on the PATH")
    parser.add_argument("--threads", type=int, help="of llama-server; default: as Covey's runner has")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write everything into this file")
    options = parser.parse_args()
    case = Case(options.prompt_tokens, options.new_tokens, options.requests)
    rival, found = Rival(options.llama_server, options.threads), list[Measured]()
    with ends_by_signal():
        for model in options.models:
            found.append(measure(model, case, options.rounds, rival))
    for model, measured in zip(options.models, found, strict=True):
        compared = comparison(measured.results[case]) or {}
        if ratio := compared["total"]:
            print(f"{model.name}: {ratio.median:.2f} x in total ({ratio.least:.2f} to {ratio.most:.2f})")
    if options.json:
        options.json.write_text(json.dumps([report(each.setting, each.results) for each in found], indent=1))


if __name__ == "__main__":
    try:
        main()
    except CliError as error:
        sys.exit(str(error))
