"""Becomes another program, one that ends with whoever started it: `python -m covey.cli.benching PROGRAM ARGUMENTS`.

A measurement that is killed would else leave a server behind that nobody knows of.
"""

import os
import sys

from covey.engine.parent import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606 (the program that was named)
