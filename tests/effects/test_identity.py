"""A node keeps one identity for life, whatever happens to its process; and never two processes share it."""

import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest

from covey.effects import identity
from covey.effects.identity import IdentityError, claimed


def read(folder: Path) -> tuple[str, int]:
    with claimed(folder) as mine:
        return mine.node_id, mine.boot


def test_an_identity_survives_restarts_and_counts_them(tmp_path: Path) -> None:
    first, second = read(tmp_path / "node"), read(tmp_path / "node")
    assert re.fullmatch(r"[0-9a-f]{32}", first[0])
    assert first[0] == second[0]
    assert first[1] < second[1]


def test_a_folder_from_a_backup_starts_above_what_others_have_seen(tmp_path: Path) -> None:
    read(tmp_path)
    (tmp_path / "boot").write_text("3")
    assert read(tmp_path)[1] > 1_000_000_000


def test_a_device_without_a_clock_counts_its_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity.time, "time", lambda: 12.0)  # 1970
    boots = [read(tmp_path)[1] for _ in range(3)]
    assert boots == [12, 13, 14]


def test_a_copied_folder_becomes_a_node_of_its_own(tmp_path: Path) -> None:
    before = read(tmp_path)[0]
    renewed = identity.renew(tmp_path)
    assert read(tmp_path)[0] == renewed != before
    assert (tmp_path / f"node.key.{before[:8]}").stat().st_mode & 0o777 == 0o600


def test_the_identity_of_a_running_node_is_not_renewed(tmp_path: Path) -> None:
    with claimed(tmp_path) as mine:
        with pytest.raises(IdentityError, match="is in use by"):
            identity.renew(tmp_path)
        before = mine.node_id
    assert read(tmp_path)[0] == before


def test_two_folders_are_two_nodes(tmp_path: Path) -> None:
    assert read(tmp_path / "a")[0] != read(tmp_path / "b")[0]


def test_only_the_owner_can_read_the_key(tmp_path: Path) -> None:
    read(tmp_path)
    key = tmp_path / "node.key"
    assert key.stat().st_mode & 0o777 == 0o600
    key.chmod(0o644)
    read(tmp_path)
    assert key.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boot", "lock", "node.key"]


@pytest.mark.parametrize(
    "content", [b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_a_damaged_key_is_told_and_never_replaced(tmp_path: Path, content: bytes) -> None:
    """A disk went bad. A fresh identity would leave a ghost of this node in the cluster."""
    read(tmp_path)
    (tmp_path / "node.key").write_bytes(content)
    with pytest.raises(IdentityError, match=r"node\.key, is damaged; put it back"), claimed(tmp_path):
        pass
    assert (tmp_path / "node.key").read_bytes() == content


def test_a_lost_count_of_starts_goes_on_above_all_counts(tmp_path: Path) -> None:
    """Otherwise everybody would drop this node's reports as old news."""
    read(tmp_path)
    for damage in (lambda path: path.unlink(), lambda path: path.write_text("x")):
        damage(tmp_path / "boot")
        assert read(tmp_path)[1] > 1_000_000_000


def test_a_second_process_is_told_who_has_the_folder(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from covey.effects.identity import claimed
with claimed(Path({str(tmp_path)!r})):
    print("held", flush=True)
    input()
"""
    script = [sys.executable, "-c", code]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        sentence = rf"data folder {re.escape(str(tmp_path))} is in use by process {holder.pid};"
        with pytest.raises(IdentityError, match=sentence), claimed(tmp_path):
            pass
        holder.kill()
    assert read(tmp_path)  # the kernel let go of the lock


def test_a_folder_that_can_not_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IdentityError, match="can't be used: there is a file of that name;"), claimed(tmp_path / "file"):
        pass
    within = tmp_path / "file" / "node"
    with pytest.raises(IdentityError, match="can't be used: a part of its path is a file"), claimed(within):
        pass


def test_a_folder_of_somebody_else_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(identity, "make_private", refuse)
    with pytest.raises(IdentityError, match="can't be used: you have no permission for it;"), claimed(tmp_path):
        pass


def test_an_error_of_the_block_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="unrelated"), claimed(tmp_path):
        raise OSError("unrelated")


def test_the_id_is_the_hash_of_the_public_key(tmp_path: Path) -> None:
    with claimed(tmp_path) as mine:
        assert identity.node_id_of(mine.key) == mine.node_id
