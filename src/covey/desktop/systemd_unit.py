"""A systemd user unit as text. The format: systemd.syntax(7), systemd.service(5), systemd.unit(5).

A value is read three times over: as a quoted string with C escapes, for specifiers that begin with %, and, in a
command, for variables that begin with $. The last is turned off by the colon before the command.
"""

from typing import Final

from covey.desktop.service import DESCRIPTION, OPEN_FILES_MAX, WRONG_USAGE_EXIT, Service

UNIT_NAME: Final = "covey.service"
STEPS_SINCE: Final = 254  # the first version of systemd that can wait longer from try to try
FIRST_WAIT_S: Final = 2
LAST_WAIT_S: Final = 60
WAIT_STEPS: Final = 5
ONLY_WAIT_S: Final = 5  # for versions before
FIRST_PRINTABLE: Final = 0x20
DELETE: Final = 0x7F
REFUSED: Final = frozenset("\"'\\")  # in the path of a program, and so are control characters


def unit(service: Service, version: int) -> str:
    """The file's text, for this version of systemd.

    A node is started again for ever, unless it ended in order (status 0) or was called wrongly. A runner that is
    killed for its memory takes nobody along, and the node is asked to end before what it started.
    """
    return "\n".join(
        [
            "[Unit]",
            f"Description={DESCRIPTION}",
            "StartLimitIntervalSec=0",
            "",
            "[Service]",
            "Type=exec",
            f"ExecStart={_command(service)}",
            *(f"Environment={quoted(f'{name}={value}')}" for name, value in service.environment),
            "Restart=on-failure",
            f"RestartPreventExitStatus={WRONG_USAGE_EXIT}",
            *_waits(version),
            "KillMode=mixed",
            f"TimeoutStopSec={service.end_s}",
            "OOMPolicy=continue",
            f"LimitNOFILE={OPEN_FILES_MAX}",
            "",
            "[Install]",
            "WantedBy=default.target",
            "",
        ]
    )


def quoted(text: str) -> str:
    """As one word of a value, whatever it holds."""
    return '"' + "".join(_escaped(character) for character in text).replace("%", "%%") + '"'


def can_start(program: str) -> bool:
    """Whether systemd takes a program of this path, however it is quoted."""
    return not REFUSED & set(program) and all(_escaped(character) == character for character in program)


def _escaped(character: str) -> str:
    if character in {'"', "\\"}:
        return f"\\{character}"
    if ord(character) < FIRST_PRINTABLE or ord(character) == DELETE:
        return f"\\x{ord(character):02x}"
    return character


def _command(service: Service) -> str:
    program, *arguments = service.command
    return " ".join(quoted(word) for word in (f":{program}", *arguments))


def _waits(version: int) -> list[str]:
    if version < STEPS_SINCE:
        return [f"RestartSec={ONLY_WAIT_S}"]
    return [f"RestartSec={FIRST_WAIT_S}", f"RestartSteps={WAIT_STEPS}", f"RestartMaxDelaySec={LAST_WAIT_S}"]
