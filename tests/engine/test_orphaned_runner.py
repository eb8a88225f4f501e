"""A node is killed: it held both ends that its runner talks to, standard error too, and the runner must not stay."""

import subprocess
import sys

from harness import make_spec

from covey.schema.runner import Configure
from covey.schema.wire import pack
from tests.credentials import credentials


def test_a_runner_whose_standard_error_is_gone_too_still_ends() -> None:
    command = [sys.executable, "-m", "covey.engine"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as runner:
        assert runner.stdin is not None
        assert runner.stdout is not None
        assert runner.stderr is not None
        runner.stdin.write(pack(Configure(make_spec(), credentials())))
        runner.stdin.flush()
        assert runner.stdout.read(4), "it listens"
        runner.stderr.close()
        runner.stdout.close()
        runner.stdin.close()
        assert runner.wait(timeout=10) != 0
