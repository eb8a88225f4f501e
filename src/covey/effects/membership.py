"""What makes this machine's nodes members of a cluster: the join code, and what a node derives from it at its start."""

import logging
import os
from pathlib import Path
from typing import Final

from msgspec import Struct

from covey.control.cluster import KEY, Cluster, Written
from covey.control.join_code import JoinCode
from covey.effects import code_file, paths, store, trust
from covey.effects.code_file import CodeFileError, Former
from covey.effects.durable import sync_folder
from covey.effects.identity import Identity
from covey.effects.store import Store
from covey.schema.ids import NodeId
from covey.schema.trust import Credentials

CLUSTER_VARIABLE: Final = "COVEY_CLUSTER"  # tells apart clusters of one code

_log = logging.getLogger(__name__)


class FormerCluster(Struct, frozen=True):
    """The same cluster under a code before. `ends_keys`: its API keys are not valid any more."""

    cluster_id: str
    ends_keys: bool


class Membership(Struct, frozen=True):
    node_id: NodeId
    code: JoinCode
    credentials: Credentials
    former: tuple[FormerCluster, ...] = ()  # the latest first


def membership_of(mine: Identity, cluster: str | None, *, is_open: bool) -> Membership:
    """Of the node `mine`. `cluster`: None is what the environment says. Raises `CodeFileError`."""
    name = os.environ.get(CLUSTER_VARIABLE, "") if cluster is None else cluster
    if is_open:
        _log.warning(
            "this node is open: whoever is on its network can join it, read what is asked and answered, and use its "
            "models. Start it without --open, and it asks for a join code"
        )
        return Membership(mine.node_id, trust.OPEN_CODE, trust.make_credentials(trust.OPEN_CODE, mine, name))
    code = code_file.kept_code(paths.home())
    known = code_file.former_codes(paths.home(), code)
    former = tuple(FormerCluster(trust.cluster_id_of(each.code, name), each.ends_keys) for each in known)
    return Membership(mine.node_id, code, trust.make_credentials(code, mine, name), former)


def keep_code(code: JoinCode) -> Path | None:
    """For all nodes of this user, from their next start on. Where the former one is now. Raises `CodeFileError`."""
    return code_file.replace_code(paths.home(), code)


def keep_successor(former: JoinCode, code: JoinCode, *, ends_keys: bool = False) -> None:
    """After a rotation it is the same cluster by another name: with the new code it is kept which one it follows, so
    that no end of this process loses what people asked for. `ends_keys`: but its API keys. Raises `CodeFileError`.
    """
    code_file.replace_code(paths.home(), code, Former(former, ends_keys))


def cluster_folder(folder: Path, member: Membership, covey_version: str) -> Path:
    """What the node of `folder` keeps of this cluster: who joins another one takes nothing of it there, and finds it
    again when coming back. What was kept under a former code is taken along. Raises `CodeFileError`, `StoreError`.
    """
    clusters = folder / "clusters"
    wanted = clusters / member.credentials.cluster_id
    try:
        paths.make_private(clusters)
        if not wanted.exists():
            _take_along(clusters, wanted, member, covey_version)
        return paths.make_private(wanted)
    except OSError as error:
        raise CodeFileError(f"{wanted} can't be used ({error.strerror or error}); check its permissions") from None


def _take_along(clusters: Path, wanted: Path, member: Membership, covey_version: str) -> None:
    former = next((each for each in member.former if (clusters / each.cluster_id).exists()), None)
    if former is None:
        return
    source = clusters / former.cluster_id
    if former.ends_keys:  # first: once the folder has moved, nobody looks at its past again
        with store.opened(source, covey_version) as intent:
            _end_keys(intent, member.node_id)
    source.rename(wanted)
    sync_folder(clusters)


def _end_keys(intent: Store, node_id: NodeId) -> None:
    """As deletions, newer than all that is known here: a copy elsewhere, even the lost device's, brings none back."""
    cluster = Cluster(node_id)
    cluster.restore(intent.restored.entries)
    living = [key for key in cluster.entries if key.startswith(KEY) and cluster.has(key)]
    intent.keep(cluster.stamp(tuple(Written(key, None) for key in living)))
    if living:
        _log.warning("the join code was changed to shut somebody out; all API keys are revoked with it")
