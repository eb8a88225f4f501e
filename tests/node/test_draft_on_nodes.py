"""Real nodes, and a model that is placed with a draft: its head has both, it answers as without, and a draft that is
missing is named.
"""

from pathlib import Path

import httpx
from nodes import NodeProcess, cluster_name, running, until
from tiny_model import write_model
from typer.testing import CliRunner

from covey.cli.main import app


def models(folder: Path) -> tuple[Path, Path]:
    """A model, and one with a tenth of its weights."""
    return write_model(folder / "model.gguf", padding=200_000, layers=4), write_model(folder / "draft.gguf")


def status(node: NodeProcess) -> str:
    done = CliRunner().invoke(app, ["ps", "--json"], env={"COVEY_URL": node.url})
    return done.stdout


def test_a_model_with_a_draft_answers_as_without_and_over_two_nodes(tmp_path: Path) -> None:
    model, draft = models(tmp_path)
    with running(tmp_path, "a", "b") as nodes:
        until(lambda: all(len(node.visibility()) == 2 for node in nodes))
        nodes[0].post("/place_instance", {"model_id": str(model)})
        until(lambda: list(nodes[0].runners().values()) == ["Ready"])
        alone = nodes[0].ask(str(model), "hello", max_tokens=60)
        nodes[0].delete(f"/instance/{nodes[0].get('/cluster')['instances'][0]['instance_id']}")
        until(lambda: not nodes[0].runners())
        env = {"COVEY_URL": nodes[0].url, "COLUMNS": "400"}
        placed = CliRunner().invoke(app, ["place", str(model), "--nodes", "2", "--draft", str(draft)], env=env)
        assert placed.exit_code == 0, placed.output
        [instance] = nodes[1].get("/cluster")["instances"]
        assert instance["draft"]["model_id"] == str(draft)
        head, other = instance["stages"]
        by_id = {member["node_id"]: member["report"] for member in nodes[0].get("/cluster")["members"]}
        files = [{each["model_id"] for each in by_id[stage["node_id"]]["downloads"]} for stage in (head, other)]
        assert files == [{str(model), str(draft)}, {str(model)}]
        assert nodes[1].ask(str(model), "hello", max_tokens=60) == alone
        assert f"draft {draft}" in " ".join(CliRunner().invoke(app, ["ps"], env=env).output.split())


def test_what_can_not_guess_is_refused_with_a_sentence(tmp_path: Path) -> None:
    model, draft = models(tmp_path)
    (tmp_path / "text.gguf").write_text("no model")
    with running(tmp_path, "a") as (node,):
        for fields, code, words in (
            ({"draft_model": str(model)}, 400, "can't be its own draft"),
            ({"draft_model": str(tmp_path / "none.gguf")}, 404, "There is no file"),
            ({"draft_model": str(tmp_path / "text.gguf")}, 400, "is no model that can be run"),
            ({"draft_model": str(draft), "context_length": 4096}, 400, "takes 2 to 512 tokens"),
        ):
            answer = httpx.post(f"{node.url}/place_instance", json={"model_id": str(model), **fields}, timeout=30)
            assert answer.status_code == code, answer.text
            assert words in answer.json()["error"]["message"]
        large = {"model_id": str(draft), "draft_model": str(model)}
        answer = httpx.post(f"{node.url}/place_instance", json=large, timeout=30)
        assert (answer.status_code, "would not be faster" in answer.text) == (400, True)


def test_a_draft_whose_file_was_deleted_is_named_when_the_node_is_back(tmp_path: Path) -> None:
    model, draft = models(tmp_path)
    cluster = cluster_name()
    with running(tmp_path, "a", cluster=cluster) as (node,):
        node.post("/place_instance", {"model_id": str(model), "draft_model": str(draft)})
        until(lambda: list(node.runners().values()) == ["Ready"])
        node.leave()
    draft.unlink()
    with running(tmp_path, "a", cluster=cluster) as (node,):
        until(lambda: f"failed: the draft {draft}: {draft} can't be read on this node" in status(node))
