"""The join code in a terminal: taken once per device, shown to whoever adds one, changed when a device is lost.

A code that was typed as an argument is visible to other users of the machine while the process runs, and one in the
environment is handed on to children. So `up` keeps the code, and goes on as a process that was started without it.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

import typer
from rich.markup import escape

from covey.cli.client import CliError, NodeClient
from covey.cli.console import err, out
from covey.control import join_code
from covey.control.join_code import JoinCode, JoinCodeError
from covey.effects import code_file, paths
from covey.effects.code_file import CodeFileError
from covey.effects.membership import keep_code
from covey.effects.neighbours import cluster_name
from covey.effects.rotation import proof_of
from covey.effects.trust import CLUSTER_ID_BYTES, OPEN_CODE, derive
from covey.schema.cluster import ClusterState
from covey.schema.ids import NodeId
from covey.schema.trust import RotationOutcome

VARIABLE: Final = "COVEY_JOIN"
OPTION: Final = "--join"
ASKS: Final = "-"
TAKEN_S_MAX: Final = 5.0  # for the new code to reach this machine where another one's node was asked
POLL_S: Final = 0.1


# ---- joining ----


def take_code(typed: str | None) -> None:
    """What `covey up` was given, if anything: keeps it, says what that means, and starts the command again without it.

    Raises `CliError`.
    """
    wanted = _given(typed)
    if wanted is None:
        return
    try:
        before = code_file.known_code(paths.home())
    except CodeFileError:  # damaged: this is how a person puts it back
        before = None
    aside = _keep(wanted)
    if wanted != before:
        _tell(before, wanted, aside)
    _start_again()


def _given(typed: str | None) -> JoinCode | None:
    if typed is not None:
        return _parsed(_asked() if typed == ASKS else typed)
    variable = os.environ.get(VARIABLE)
    if not variable:
        return None
    code = _parsed(variable)
    if code in _replaced():  # it stands in a service's file, and was replaced by a rotation since
        os.environ.pop(VARIABLE)
        sentence = f"{VARIABLE} holds a join code that was replaced on this machine, and is ignored; update it."
        err.print(f"{sentence} `covey up --join CODE` would go back to it.", soft_wrap=True)
        return None
    return code


def _asked() -> str:
    return typer.prompt("Join code", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline()


def _parsed(typed: str) -> JoinCode:
    try:
        return join_code.parse(typed)
    except JoinCodeError as error:
        raise CliError(f"{_capital(str(error))}.") from None


def _replaced() -> list[JoinCode]:
    """By rotations, and the last one that was replaced in any way."""
    try:
        present = code_file.known_code(paths.home())
        rotated = code_file.former_codes(paths.home(), present) if present else ()
    except CodeFileError:  # there is none that could be mistaken
        return []
    return [code for code in (*_set_aside(), *(each.code for each in rotated)) if code != present]


def _set_aside() -> list[JoinCode]:
    """None if the file is missing or damaged: what rotations replaced counts all the same."""
    try:
        return [join_code.parse((paths.home() / code_file.FORMER_FILE).read_text(errors="replace"))]
    except (OSError, JoinCodeError):
        return []


def _keep(code: JoinCode) -> Path | None:
    try:
        return keep_code(code)
    except CodeFileError as error:
        raise CliError(f"{_capital(str(error))}.") from None


def _tell(before: JoinCode | None, wanted: JoinCode, aside: Path | None) -> None:
    joins = f"joins cluster {_cluster_name(wanted)}"
    leaves = f"leaves cluster {_cluster_name(before)} and " if before else ""
    kept = f" The former code is kept in {escape(str(aside))}." if aside else ""
    out.print(f"This device {leaves}{joins}.{kept}", soft_wrap=True)


def _start_again() -> NoReturn:
    os.environ.pop(VARIABLE, None)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *without_code(sys.orig_argv[1:])])  # noqa: S606 (our own command line)


def without_code(arguments: Sequence[str]) -> list[str]:
    """A command line without `--join CODE`."""
    left, is_code = [], False
    for argument in arguments:
        if not is_code and argument != OPTION and not argument.startswith(f"{OPTION}="):
            left.append(argument)
        is_code = argument == OPTION and not is_code
    return left


# ---- showing ----


def how_to_join(*, is_open: bool) -> str:
    """For whoever starts a node: how another device is added. The code is for a person's eyes: no log gets it."""
    if is_open:
        return "covey up --open (on another device of this network, whoever owns it)"
    if not out.is_terminal:
        return "covey join-code (shows the command that adds a device)"
    return f"[bold]{_command(shown_code())}[/] (on another device)"


def shown_code() -> JoinCode:
    """Of this machine; made now if there was none. Raises `CliError`."""
    try:
        return code_file.kept_code(paths.home())
    except CodeFileError as error:
        raise CliError(f"{_capital(str(error))}.") from None


def show_code() -> None:
    code = shown_code()
    out.print(
        f"On the device that is to join cluster {_cluster_name(code)}:\n\n  [bold]{_command(code)}[/]\n",
        soft_wrap=True,
        highlight=False,
    )
    out.print(
        "Whoever has this code is a full member of the cluster: give it to nobody whose device is not to join. "
        "`covey join-code rotate --without NODE` shuts a device out.",
        style="dim",
    )


def code_report() -> dict[str, str]:
    code = shown_code()
    names = {"cluster_id": _cluster_id(code), "cluster_name": _cluster_name(code)}
    return {"join_code": code.text(), "command": _command(code), **names}


def _command(code: JoinCode) -> str:
    return f"covey up {OPTION} {code.text()}"


def _cluster_name(code: JoinCode) -> str:
    """As nodes of other clusters tell of it."""
    return "(open)" if code == OPEN_CODE else cluster_name(_cluster_id(code))


def _cluster_id(code: JoinCode) -> str:
    name = os.environ.get("COVEY_CLUSTER", "")
    return "(open)" if code == OPEN_CODE else derive(code, "cluster id", name, CLUSTER_ID_BYTES).hex()


# ---- changing ----


def rotate(url: str, without: Sequence[str]) -> None:
    """Raises `CliError`."""
    before = shown_code()
    with NodeClient(url) as node:
        state = node.cluster()
        outcome = node.rotate_code(proof_of(before), [_node_named(state, name) for name in without])
    code = _wait_changed(before)
    names = {member.node_id: member.report.name for member in state.members if member.report}
    count = len(outcome.reached) + 1
    out.print(f"The join code is changed; {count} node{'s have' if count > 1 else ' has'} the new one.")
    for node_id in outcome.missed:
        out.print(f"{escape(names.get(node_id, node_id[:8]))} was not reached: it is outside until it joins anew.")
    _tell_keys(outcome)
    out.print(f"\nTo add a device, or one that was not reached:\n\n  [bold]{_command(code)}[/]", highlight=False)


def _tell_keys(outcome: RotationOutcome) -> None:
    if outcome.keys_revoked:
        revoked = escape(", ".join(outcome.keys_revoked))
        out.print(f"All API keys are revoked: {revoked}. `covey keys add NAME` makes new ones.", soft_wrap=True)
    if outcome.keys_valid:
        valid = escape(", ".join(outcome.keys_valid))
        out.print(f"API keys still valid: {valid}; `covey keys revoke NAME` removes one.", soft_wrap=True)


def _wait_changed(before: JoinCode) -> JoinCode:
    """The new code, which this user's node keeps before it answers. Raises `CliError`."""
    deadline = time.monotonic() + TAKEN_S_MAX
    while (code := shown_code()) == before:
        if time.monotonic() > deadline:
            raise CliError(
                "The join code is changed, but no node of this machine got it. `covey join-code` on a device that did "
                "shows it."
            )
        time.sleep(POLL_S)
    return code


def _node_named(state: ClusterState, name: str) -> NodeId:
    """By its name, or by the beginning of its id. Raises `CliError`."""
    names = {each.node_id: each.report.name if each.report else "" for each in state.members}
    found = [node_id for node_id, called in names.items() if called == name or (name and node_id.startswith(name))]
    if len(found) != 1:
        known = ", ".join(f"{called} ({node_id[:8]})" for node_id, called in names.items())
        what = "No node is" if not found else "More than one node is"
        raise CliError(
            f"{what} called {name}; here are: {known}. Nodes that are gone get no new code, so they need no --without; "
            "`covey keys revoke NAME` ends an API key that was on one."
        )
    if found[0] == state.node_id:
        raise CliError("The node that changes the code keeps it: run the command on one that stays.")
    return found[0]


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
