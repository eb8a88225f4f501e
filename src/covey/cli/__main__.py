"""`python -m covey.cli` is the command `covey`."""

from covey.cli.main import main

main()
