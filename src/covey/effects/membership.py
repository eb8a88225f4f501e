"""What makes this machine's nodes members of a cluster: the join code, and what a node derives from it at its start."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from covey.control.join_code import JoinCode
from covey.effects import code_file, paths, trust
from covey.effects.code_file import CodeFileError
from covey.effects.durable import sync_folder
from covey.effects.identity import Identity
from covey.schema.trust import Credentials

CLUSTER_VARIABLE: Final = "COVEY_CLUSTER"  # tells apart clusters of one code

_log = logging.getLogger(__name__)


class Membership(Struct, frozen=True):
    code: JoinCode
    credentials: Credentials
    former_ids: tuple[str, ...] = ()  # of the same cluster under the codes before, the latest first


def membership_of(mine: Identity, cluster: str | None, *, is_open: bool) -> Membership:
    """Of the node `mine`. `cluster`: None is what the environment says. Raises `CodeFileError`."""
    name = os.environ.get(CLUSTER_VARIABLE, "") if cluster is None else cluster
    if is_open:
        _log.warning(
            "this node is open: whoever is on its network can join it, read what is asked and answered, and use its "
            "models. Start it without --open, and it asks for a join code"
        )
        return Membership(trust.OPEN_CODE, trust.make_credentials(trust.OPEN_CODE, mine, name))
    code = code_file.kept_code(paths.home())
    former = code_file.former_codes(paths.home(), code)
    former_ids = tuple(trust.cluster_id_of(each, name) for each in former)
    return Membership(code, trust.make_credentials(code, mine, name), former_ids)


def keep_code(code: JoinCode) -> Path | None:
    """For all nodes of this user, from their next start on. Where the former one is now. Raises `CodeFileError`."""
    return code_file.replace_code(paths.home(), code)


def keep_successor(former: JoinCode, code: JoinCode) -> None:
    """After a rotation it is the same cluster by another name: with the new code it is kept which one it follows, so
    that no end of this process loses what people asked for. Raises `CodeFileError`.
    """
    code_file.replace_code(paths.home(), code, former)


def cluster_folder(folder: Path, member: Membership) -> Path:
    """What the node of `folder` keeps of this cluster: who joins another one takes nothing of it there, and finds it
    again when coming back. What was kept under a former code is taken along. Raises `CodeFileError`.
    """
    clusters = folder / "clusters"
    wanted = clusters / member.credentials.cluster_id
    try:
        paths.make_private(clusters)
        if not wanted.exists():
            _take_along([clusters / each for each in member.former_ids], wanted)
        return paths.make_private(wanted)
    except OSError as error:
        raise CodeFileError(f"{wanted} can't be used ({error.strerror or error}); check its permissions") from None


def _take_along(former: Sequence[Path], wanted: Path) -> None:
    source = next((each for each in former if each.exists()), None)
    if source is not None:
        source.rename(wanted)
        sync_folder(wanted.parent)
