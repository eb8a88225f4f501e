"""The entry of the runner process: `python -m covey.engine`."""

import sys

from covey.engine.runner import main

sys.exit(main())
