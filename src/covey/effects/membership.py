"""What makes this machine's nodes members of a cluster: the join code, and what a node derives from it at its start."""

import logging
import os
from pathlib import Path
from typing import Final

from msgspec import Struct

from covey.control.join_code import JoinCode
from covey.effects import code_file, paths, trust
from covey.effects.code_file import CodeFileError
from covey.effects.identity import Identity
from covey.schema.trust import Credentials

CLUSTER_VARIABLE: Final = "COVEY_CLUSTER"  # tells apart clusters of one code

_log = logging.getLogger(__name__)


class Membership(Struct, frozen=True):
    code: JoinCode
    credentials: Credentials


def membership_of(mine: Identity, cluster: str | None, *, is_open: bool) -> Membership:
    """Of the node `mine`. `cluster`: None is what the environment says. Raises `CodeFileError`."""
    name = os.environ.get(CLUSTER_VARIABLE, "") if cluster is None else cluster
    if is_open:
        _log.warning(
            "this node is open: whoever is on its network can join it, read what is asked and answered, and use its "
            "models. Start it without --open, and it asks for a join code"
        )
    code = trust.OPEN_CODE if is_open else code_file.kept_code(paths.home())
    return Membership(code, trust.make_credentials(code, mine, name))


def keep_code(code: JoinCode) -> Path | None:
    """For all nodes of this user, from their next start on. Where the former one is now. Raises `CodeFileError`."""
    return code_file.replace_code(paths.home(), code)


def cluster_folder(folder: Path, member: Membership) -> Path:
    """What the node of `folder` keeps of this cluster: who joins another one takes nothing of it there, and finds it
    again when coming back. Raises `CodeFileError`.
    """
    wanted = _folder_of(folder, member)
    try:
        return paths.make_private(wanted)
    except OSError as error:
        raise CodeFileError(f"{wanted} can't be used ({error.strerror or error}); check its permissions") from None


def take_along(folder: Path, former: Membership, member: Membership) -> None:
    """After a rotation it is the same cluster by another name. Raises `CodeFileError`."""
    source, target = _folder_of(folder, former), _folder_of(folder, member)
    try:
        if not target.exists():
            source.rename(target)
    except OSError as error:
        raise CodeFileError(
            f"what people asked for can't be moved from {source} to {target} ({error.strerror or error}); "
            "move it by hand, or start the node without it"
        ) from None


def _folder_of(folder: Path, member: Membership) -> Path:
    return folder / "clusters" / member.credentials.cluster_id
