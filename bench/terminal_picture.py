"""Draws the README's picture: what `make run ONCE=1` really prints, as an SVG without fonts from elsewhere.

python bench/terminal_picture.py docs/first-light.svg
"""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 88
RUN_SECONDS_MAX = 300


def main() -> None:
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "covey.cli", "demo", "--once"]
    pipe = subprocess.PIPE
    done = subprocess.run(command, env=environment, stdout=pipe, stderr=pipe, timeout=RUN_SECONDS_MAX, check=True)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    console.print("$ make run ONCE=1", style="bold green")
    console.print(Text.from_ansi(done.stdout.decode()))
    drawn = console.export_svg(title="covey")
    Path(sys.argv[1]).write_text(re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL))


if __name__ == "__main__":
    main()
