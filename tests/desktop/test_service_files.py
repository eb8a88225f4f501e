"""What a person typed reaches the node, whatever is in it; and the files say when it is started again."""

import os
import plistlib
import shutil
import string
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.desktop.launch_agent import LABEL, agent
from covey.desktop.service import Service, ServiceError, kept_environment, node_service
from covey.desktop.systemd_unit import can_start, quoted, unit

ODD = (
    "/opt/my programs/pythön",
    "up",
    '--name=a "b" %n $HOME \\x 100%',
    "--data-dir=/häuser/двa\t\n",
    ";",
    "",
    "--x='y'",
)
SERVICE = Service(command=ODD, environment=(("COVEY_HOME", '/x "y" %h $Z'),), end_s=77)
NO_VERIFY = "" if shutil.which("systemd-analyze") else "there is no systemd-analyze here"


def rows(text: str) -> list[tuple[str, str]]:
    return [(name, value) for name, sign, value in (line.partition("=") for line in text.splitlines()) if sign]


def test_a_unit_says_when_a_node_is_started_again() -> None:
    found = rows(unit(SERVICE, 254))
    assert dict(found) | {
        "Restart": "on-failure",  # SIGKILL is one, systemd.service(5) says, and so is being killed for memory
        "RestartSec": "2",
        "RestartSteps": "5",
        "RestartMaxDelaySec": "60",
        "RestartPreventExitStatus": "2",  # wrong usage
        "StartLimitIntervalSec": "0",  # no try is the last
        "OOMPolicy": "continue",
        "TimeoutStopSec": "77",
    } == dict(found)
    assert len(found) == len(dict(found)), "one variable, so nothing is said twice"


def test_an_older_systemd_is_given_nothing_that_it_does_not_know() -> None:
    found = dict(rows(unit(SERVICE, 253)))
    assert found["RestartSec"] == "5"
    assert not {"RestartSteps", "RestartMaxDelaySec"} & set(found)


def unquoted(word: str) -> str:
    """What systemd reads, by systemd.syntax(7) and systemd.unit(5): a second reading of the manual."""
    assert word[0] == word[-1] == '"'
    inner, found = word[1:-1], ""
    while inner:
        if inner.startswith("\\x"):
            found, inner = found + chr(int(inner[2:4], 16)), inner[4:]
        elif inner[0] in "\\%":
            assert inner[1] in ('"\\' if inner[0] == "\\" else "%")
            found, inner = found + inner[1], inner[2:]
        else:
            assert inner[0] not in '"\n'
            found, inner = found + inner[0], inner[1:]
    return found


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_every_text_is_read_back_as_it_was(text: str) -> None:
    assert unquoted(quoted(text)) == text
    assert not set(quoted(text)) & set(string.whitespace[1:]), "a value is one line"


@pytest.mark.skipif(bool(NO_VERIFY), reason=NO_VERIFY)
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    program = tmp_path / "my programs 100% $HOME" / "pythön"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    file = tmp_path / "covey.service"
    version = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout
    made = Service(command=(str(program), *ODD[1:]), environment=SERVICE.environment, end_s=SERVICE.end_s)
    file.write_text(unit(made, int("".join(filter(str.isdigit, version.split()[1])))))
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", str(file)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, [line for line in done.stderr.splitlines() if "covey" in line]) == (0, [])


def test_a_program_that_systemd_would_not_start() -> None:
    assert [can_start(path) for path in ("/a b/ü$%", "/a'b", '/a"b', "/a\\b", "/a\nb")] == [True, *[False] * 4]


def test_an_agent_says_when_a_node_is_started_again() -> None:
    found = plistlib.loads(agent(SERVICE, Path("/log")))
    assert found["Label"] == LABEL
    assert found["ProgramArguments"] == list(ODD)
    assert found["EnvironmentVariables"] == dict(SERVICE.environment)
    assert found["KeepAlive"] == {"SuccessfulExit": False}
    assert found["RunAtLoad"] is True
    assert found["ThrottleInterval"] == 10
    assert found["ExitTimeOut"] == 77
    assert found["StandardErrorPath"] == "/log"


@pytest.mark.parametrize(("given", "end_s"), [({}, 30), ({"COVEY_SHUTDOWN_TIMEOUT_S": "120.5"}, 145)])
def test_a_node_is_given_the_time_that_its_runners_may_take_to_end(given: dict[str, str], end_s: int) -> None:
    """6 s beside the runners, 10 s for killed ones to go, and some room."""
    assert node_service([], Path("/home/me/covey"), given).end_s == end_s


def test_a_limit_that_covey_up_would_refuse_is_refused() -> None:
    with pytest.raises(ServiceError, match="COVEY_SHUTDOWN_TIMEOUT_S is 'soon', which is no number"):
        node_service([], Path("/home/me/covey"), {"COVEY_SHUTDOWN_TIMEOUT_S": "soon"})


def test_no_secret_is_written() -> None:
    environment = {
        "COVEY_JOIN": "secret",
        "COVEY_API_KEY": "secret",
        "HF_TOKEN": "secret",
        "COVEY_URL": "a client's",
        "COVEY_HOME": "/relative/to/what/was/typed",
        "COVEY_CLUSTER": "attic",
        "COVEY_LOAD_TIMEOUT_S": "900",
        "COVEY_STEP_TIMEOUT_S": "",
    }
    kept = (("COVEY_CLUSTER", "attic"), ("COVEY_LOAD_TIMEOUT_S", "900"))
    assert kept_environment(environment) == kept
    made = node_service(["--port=1"], Path("/home/me/covey"), environment)
    assert made.environment == (("COVEY_HOME", "/home/me/covey"), *kept)
    assert made.command[1:] == ("-P", "-m", "covey.cli", "up", "--port=1")
    assert "secret" not in unit(made, 252) + agent(made, Path("/log")).decode()
