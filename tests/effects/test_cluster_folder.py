"""A join code is changed and the power goes, at any moment: what people asked for is there at the next start."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from covey.control.cluster import Cluster, encoded
from covey.control.join_code import JoinCode
from covey.effects import code_file, store
from covey.effects.code_file import CodeFileError, former_codes, known_code, replace_code
from covey.effects.membership import cluster_folder, keep_code, keep_successor, membership_of
from covey.schema.cluster import ApiKey, Entry, Version
from covey.schema.ids import NodeId
from tests.credentials import CODE, OTHER_CODE, node

THIRD_CODE = JoinCode(bytes([3]) * 16)
ASKED = "what people asked for"
Rotate = Callable[[], object]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COVEY_HOME", str(tmp_path / "home"))
    replace_code(tmp_path / "home", CODE)
    return tmp_path / "home"


def started(folder: Path, cluster: str = "") -> Path:
    """Where the node of `folder` keeps what people asked for, as it is at its start."""
    return cluster_folder(folder, membership_of(node(1), cluster, is_open=False), "1")


def asked(folder: Path, cluster: str = "") -> Path:
    kept = started(folder, cluster) / "intent.sqlite"
    kept.write_text(ASKED)
    return kept


def test_what_people_asked_for_follows_a_new_code(tmp_path: Path) -> None:
    asked(tmp_path / "n")
    keep_successor(CODE, OTHER_CODE)
    assert (started(tmp_path / "n") / "intent.sqlite").read_text() == ASKED
    assert len(list((tmp_path / "n" / "clusters").iterdir())) == 1


def test_two_new_codes_before_a_start(tmp_path: Path) -> None:
    """Another node of this user changed it twice while this one was off; a third node has a cluster of another name."""
    asked(tmp_path / "n")
    asked(tmp_path / "other", "other")
    keep_successor(CODE, OTHER_CODE)
    keep_successor(OTHER_CODE, THIRD_CODE)
    assert (started(tmp_path / "n") / "intent.sqlite").read_text() == ASKED
    assert (started(tmp_path / "other", "other") / "intent.sqlite").read_text() == ASKED


def test_who_joins_another_cluster_takes_nothing_along_and_finds_it_again(tmp_path: Path, home: Path) -> None:
    asked(tmp_path / "n")
    keep_code(OTHER_CODE)
    assert former_codes(home, OTHER_CODE) == ()
    assert list(started(tmp_path / "n").iterdir()) == []
    keep_code(CODE)
    assert (started(tmp_path / "n") / "intent.sqlite").read_text() == ASKED


def test_of_two_former_folders_the_latest_is_taken(tmp_path: Path) -> None:
    """Somebody went back to the first code for a while."""
    asked(tmp_path / "n")
    keep_successor(CODE, OTHER_CODE)
    started(tmp_path / "n")
    keep_code(CODE)
    asked(tmp_path / "n").write_text("asked under the first code")
    keep_code(OTHER_CODE)
    keep_successor(OTHER_CODE, THIRD_CODE)
    assert (started(tmp_path / "n") / "intent.sqlite").read_text() == ASKED


class PowerCutError(BaseException):
    """Nothing after it happens: no handler of ours runs either."""


def cut_at(write: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The power goes instead of the write with that number. Returns what is written until then."""
    real, done = code_file.write_durably, list[str]()

    def cut(path: Path, content: bytes, mode: int = 0o600) -> None:
        if len(done) == write:
            raise PowerCutError
        done.append(path.name)
        real(path, content, mode)

    monkeypatch.setattr(code_file, "write_durably", cut)
    return done


@pytest.mark.parametrize("write", range(4))
def test_the_power_goes_at_any_moment(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    asked(tmp_path / "n")
    with monkeypatch.context() as patched:
        written = cut_at(write, patched)
        was_cut = _is_cut(lambda: keep_successor(CODE, OTHER_CODE))
    assert was_cut is (write < 3), written
    assert known_code(home) == (CODE if was_cut else OTHER_CODE)  # the code is what is written last
    assert (started(tmp_path / "n") / "intent.sqlite").read_text() == ASKED
    keep_successor(known_code(home) or CODE, THIRD_CODE)  # and it can be tried again
    assert (started(tmp_path / "n") / "intent.sqlite").read_text() == ASKED


@pytest.mark.parametrize("write", range(3))
def test_the_power_goes_in_the_second_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    asked(tmp_path / "n")
    keep_successor(CODE, OTHER_CODE)
    with monkeypatch.context() as patched:
        cut_at(write, patched)
        assert _is_cut(lambda: keep_successor(OTHER_CODE, THIRD_CODE))
    assert (started(tmp_path / "n") / "intent.sqlite").read_text() == ASKED


@pytest.mark.parametrize(("name", "call"), [("mkdir", 0), ("rename", 0), ("mkdir", 1)])
def test_the_power_goes_around_the_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    asked(tmp_path / "n")
    keep_successor(CODE, OTHER_CODE)
    with monkeypatch.context() as patched:
        real, calls = getattr(Path, name), list[Path]()

        def cut(path: Path, *arguments: object, **options: object) -> object:
            calls.append(path)
            if len(calls) > call:
                raise PowerCutError
            return real(path, *arguments, **options)

        patched.setattr(Path, name, cut)
        assert _is_cut(lambda: started(tmp_path / "n")), calls
    assert (started(tmp_path / "n") / "intent.sqlite").read_text() == ASKED


def test_a_full_disk_changes_no_code(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(code_file, "write_durably", full)
        with pytest.raises(CodeFileError, match="No space left on device"):
            keep_successor(CODE, OTHER_CODE)
    assert known_code(home) == CODE


def test_a_damaged_list_of_former_codes_is_told_and_ends_nothing(
    tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked(tmp_path / "n")
    keep_successor(CODE, OTHER_CODE)
    path = home / "join-code.rotations"
    path.write_bytes(b"\xff\n0000 1111\n" + path.read_bytes())
    assert (started(tmp_path / "n") / "intent.sqlite").read_text() == ASKED
    assert f"{path} is damaged" in caplog.text
    assert CODE.text() not in caplog.text


def test_the_list_of_former_codes_is_private_and_bounded(home: Path) -> None:
    codes: Sequence[JoinCode] = [JoinCode(number.to_bytes(16)) for number in range(100)]
    for former, code in pairwise(codes):
        keep_successor(former, code)
    path = home / "join-code.rotations"
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_text().splitlines()) == 64
    assert [each.code for each in former_codes(home, codes[-1])[:2]] == [codes[-2], codes[-3]]


# ---- somebody was shut out ----

KEY, REVOKED, WISH, STRANGE = "key/laptop", "key/phone", "wish/w", "key/strange"


def version(counter: int) -> Version:
    return Version(counter, NodeId("a"))


ENTRIES = {
    KEY: Entry(encoded(ApiKey(key_id="laptop", name="l", salt=b"s", digest=b"d", created_s=1)), version(4)),
    REVOKED: Entry(None, version(3)),
    STRANGE: Entry(b"of a newer version", version(9)),
    WISH: Entry(b"w", version(2)),
}


def kept(folder: Path) -> dict[str, Entry]:
    with store.opened(folder, "1") as opened:
        return opened.restored.entries


def with_keys(folder: Path) -> Path:
    kept_here = started(folder)
    with store.opened(kept_here, "1") as opened:
        opened.keep(ENTRIES)
    return kept_here


def test_the_keys_end_with_a_code_that_shuts_somebody_out(tmp_path: Path) -> None:
    """Also where a later code, or another node of this user, follows before this node starts."""
    with_keys(tmp_path / "n")
    keep_successor(CODE, OTHER_CODE, ends_keys=True)
    keep_successor(OTHER_CODE, THIRD_CODE)
    entries = kept(started(tmp_path / "n"))
    assert {key for key, entry in entries.items() if entry.value is not None} == {WISH}
    assert entries[WISH] == ENTRIES[WISH]
    assert entries[REVOKED] == ENTRIES[REVOKED]
    for key in (KEY, STRANGE):  # a copy that comes back is older than its end
        assert entries[key].version > ENTRIES[key].version
    cluster = Cluster(node(1).node_id)
    cluster.restore(entries)
    cluster.merge(ENTRIES)
    assert cluster.keys == {}


def test_the_keys_stay_with_a_code_that_shuts_nobody_out(tmp_path: Path) -> None:
    with_keys(tmp_path / "n")
    keep_successor(CODE, OTHER_CODE)
    keep_successor(OTHER_CODE, THIRD_CODE)
    assert kept(started(tmp_path / "n")) == ENTRIES


def test_the_power_goes_before_the_keys_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_keys(tmp_path / "n")
    keep_successor(CODE, OTHER_CODE, ends_keys=True)
    for target, name in ((store.Store, "keep"), (Path, "rename")):
        with monkeypatch.context() as patched:
            patched.setattr(target, name, _cut)
            assert _is_cut(lambda: started(tmp_path / "n"))
    assert kept(started(tmp_path / "n"))[KEY].value is None


def _cut(*_: object, **__: object) -> None:
    raise PowerCutError


def _is_cut(act: Rotate) -> bool:
    try:
        act()
    except PowerCutError:
        return True
    return False
