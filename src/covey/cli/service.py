"""`covey service`: a node that starts when its user logs in, and again when it dies."""

import getpass
import inspect
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Final, cast, get_args

import typer
from msgspec import structs

from covey.cli.client import CliError
from covey.cli.console import err, out
from covey.cli.options import Json, explained, print_json, refuse_contradictions
from covey.desktop.managers import Manager, manager
from covey.desktop.service import NOT_INSTALLED, ServiceError, ServiceStatus, node_service
from covey.effects import paths

SETTLE_S: Final = 3.0  # in which a node that can't start has ended
POLL_S: Final = 0.5
ENDS_REST: Final = "`covey service uninstall` ends what is left"
LINGER_FOLDER: Final = Path("/var/lib/systemd/linger")  # a file for each user whose services outlive the log-out

app = typer.Typer(
    name="service", help="Run a node as a service: from log-in on, and again when it dies.", no_args_is_help=True
)


def offer_install(up: Callable[..., None]) -> None:
    """Adds the command that takes the options of `up`, whatever they are."""

    @app.command("install", help="Run `covey up` with these options as a service: now, and at each log-in.")
    @explained
    @wraps(up)
    def install(**given: Any) -> None:  # pyright: ignore[reportUnusedFunction] - it is registered
        found = _manager()  # before anything is kept
        _install(found, written(inspect.signature(up), _taken(given)))


def _manager() -> Manager:
    try:
        return manager()
    except ServiceError as error:
        raise CliError(str(error)) from None


def _install(found: Manager, arguments: Sequence[str]) -> None:
    try:
        is_new = found.install(node_service(arguments, paths.home(), os.environ))
        status = _settled(found)
    except ServiceError as error:
        raise CliError(str(error)) from None
    out.print(f"The service is {'installed' if is_new else 'updated'}: {status.file}", soft_wrap=True, markup=False)
    out.print(f"It runs: {shlex.join(['covey', 'up', *arguments])}", soft_wrap=True, markup=False)
    out.print(f"Its log: {status.log_command}", soft_wrap=True, markup=False)
    if not status.is_running or status.restarts:
        raise CliError(f"But the node ends as soon as it starts ({status.state}): its log says why.")
    if status.manager == "systemd" and not (LINGER_FOLDER / getpass.getuser()).exists():
        err.print(_linger(getpass.getuser()), soft_wrap=True, markup=False, style="dim")


@app.command()
@explained
def uninstall() -> None:
    """Stop the service and remove it; data stays."""
    try:
        was_there = manager().uninstall()
    except ServiceError as error:
        raise CliError(str(error)) from None
    if not was_there:
        out.print("No service is installed, so there is nothing to remove.")
        return
    out.print("The service is stopped and removed.")
    out.print(
        f"Models, identity and join code stay in {paths.home()}; delete that folder to remove them.",
        soft_wrap=True,
        markup=False,
    )


@app.command()
@explained
def status(as_json: Json = False) -> None:  # noqa: FBT002 (Typer's way to a flag)
    """Say whether the service is installed and runs, since when, and where its log is."""
    try:
        found = manager().status()
    except ServiceError as error:
        raise CliError(str(error)) from None
    if as_json:
        print_json(structs.asdict(found))
    else:
        out.print("\n".join(status_lines(found)), soft_wrap=True, markup=False)


def status_lines(found: ServiceStatus) -> list[str]:
    if found.state == NOT_INSTALLED:
        return ["No service is installed. `covey service install` installs one, with the options of `covey up`."]
    rows = [
        ("service", f"{found.state}, under {found.manager}"),
        ("process", found.process_id),
        ("since", found.since),
        ("restarts", found.restarts),
        ("file", found.file if found.is_installed else f"{found.file} is gone; {ENDS_REST}"),
        ("log", found.log_command),
    ]
    return [f"{title:<9} {value}" for title, value in rows if value is not None]


def _taken(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `covey up` was to be given, without the join code: that is kept at once, where each node finds it.

    A file of a service is no place for a secret.
    """
    from covey.cli import joining  # noqa: PLC0415 (the other commands start faster so)

    if given["until_stdin_closes"]:
        raise typer.BadParameter("--until-stdin-closes is not for a service, which has no standard input.")
    refuse_contradictions(given)
    if not given["anyone_joins"]:
        joining.take_code(given["join"])
    return {name: value for name, value in given.items() if name != "join"}


def written(known: inspect.Signature, given: Mapping[str, Any]) -> list[str]:
    """Options as a command line that means the same from any folder; those that are as by default are left out."""
    return [
        word
        for name, value in given.items()
        if value != known.parameters[name].default
        for word in _words(_flag(known.parameters[name]), value)
    ]


def _flag(parameter: inspect.Parameter) -> str:
    """As Typer makes it: from the option's declaration, else from the name. In an annotation the first word of a
    declaration stands where a default would.
    """
    words = [word for info in get_args(parameter.annotation)[1:] for word in (info.default, *(info.param_decls or ()))]
    declared = [word for word in words if isinstance(word, str) and word.startswith("--")]
    return declared[0] if declared else f"--{parameter.name.replace('_', '-')}"


def _words(flag: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if isinstance(value, list):
        return [f"{flag}={each}" for each in cast("list[str]", value)]
    return [f"{flag}={value.expanduser().absolute() if isinstance(value, Path) else value}"]


def _settled(found: Manager) -> ServiceStatus:
    """When a node that can't start would have ended: sooner, if it has."""
    deadline = time.monotonic() + SETTLE_S
    status = found.status()
    while status.is_running and not status.restarts and time.monotonic() < deadline:
        time.sleep(POLL_S)
        status = found.status()
    return status


def _linger(user: str) -> str:
    return (
        "It starts when you log in, and ends some time after your last session does. `loginctl enable-linger "
        f"{user}` (may ask for a password) would let it start with the machine, and stay."
    )
