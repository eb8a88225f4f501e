"""The macOS application around `covey`: it says why the local network is used, so that macOS asks instead of dropping.

It holds no copy of the program: a script finds `covey` whenever it starts. Keys of `Info.plist`: Apple's Information
Property List reference, and technical note TN3179 on the local network.
"""

import plistlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from xml.parsers.expat import ExpatError

BUNDLE_NAME: Final = "Covey.app"
BUNDLE_ID: Final = "covey.launcher"
PROGRAM: Final = "covey"
INFO_FILE: Final = "Contents/Info.plist"
PROGRAM_FILE: Final = f"Contents/MacOS/{PROGRAM}"
FOLDERS: Final = ("", "Contents", "Contents/MacOS")
PROGRAM_MODE: Final = 0o755
FILE_MODE: Final = 0o644
FOLDER_MODE: Final = 0o755
USAGE: Final = (
    "Covey finds your other devices on this network and shares the work of language models with them. "
    "Without this, no other device is found."
)

_SCRIPT: Final = r"""#!/bin/sh
# Starts the covey that is installed now: the one on PATH, else the one that made this bundle.
# Arguments are passed on; without any, as from the Finder, it is `covey up`.
[ "$#" -gt 0 ] || set -- up
if found=$(command -v covey) && ! [ "$found" -ef "$0" ]; then
    exec "$found" "$@"
fi
if [ -x {program} ]; then
    exec {command} "$@"
fi
message="covey is not found: it is not on PATH, and no longer at the place from where this application was made. \
Install it, and make the application anew with: covey launcher"
echo "$message" >&2
if command -v osascript >/dev/null; then
    osascript -e "display alert \"$message\"" >/dev/null
fi
exit 1
"""


class BundleError(Exception):
    """The bundle can't be written; the message is one sentence for a person."""


def info(version: str) -> bytes:
    """`Info.plist`. No Bonjour service is named, since none is used: nodes meet by multicast of their own."""
    return plistlib.dumps(
        {
            "CFBundleIdentifier": BUNDLE_ID,
            "CFBundleName": "Covey",
            "CFBundleExecutable": PROGRAM,
            "CFBundlePackageType": "APPL",
            "CFBundleInfoDictionaryVersion": "6.0",
            "CFBundleShortVersionString": version,
            "CFBundleVersion": version,
            "LSUIElement": True,  # no icon in the Dock: it has no window
            "NSLocalNetworkUsageDescription": USAGE,
            "NSBonjourServices": [],
        }
    )


def script(command: Sequence[str]) -> str:
    """`command`: how the program is called where PATH has no `covey`: an absolute path, then its arguments."""
    return _SCRIPT.format(program=shlex.quote(command[0]), command=shlex.join(command))


def write_bundle(folder: Path, command: Sequence[str], version: str) -> Path:
    """Makes the bundle in `folder`, or renews it there. Raises `BundleError`."""
    bundle = folder / BUNDLE_NAME
    try:
        if bundle.exists() and not _is_ours(bundle):
            raise BundleError(
                f"{bundle} is there already and is not ours; move it away, or choose a folder with --output"
            )
        for name in FOLDERS:
            (bundle / name).mkdir(parents=not name, exist_ok=True)
            (bundle / name).chmod(FOLDER_MODE)
        _write(bundle / INFO_FILE, info(version), FILE_MODE)
        _write(bundle / PROGRAM_FILE, script(command).encode(), PROGRAM_MODE)
    except OSError as error:
        raise BundleError(
            f"{bundle} can't be written ({error.strerror or error}); choose another folder with --output"
        ) from None
    return bundle


def _is_ours(bundle: Path) -> bool:
    try:
        found = plistlib.loads((bundle / INFO_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, plistlib.InvalidFileException, ExpatError, ValueError):
        return False
    return isinstance(found, dict) and found.get("CFBundleIdentifier") == BUNDLE_ID


def _write(path: Path, content: bytes, mode: int) -> None:
    path.write_bytes(content)
    path.chmod(mode)  # whatever the umask says: others of the machine start it, too
