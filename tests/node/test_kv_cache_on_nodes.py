"""Real nodes with a KV cache in 16-bit floats: asked for at the terminal, counted, loaded so, and shown."""

from pathlib import Path

import httpx
from nodes import running, until
from tiny_model import write_model
from typer.testing import CliRunner

from covey.cli.main import app


def test_a_model_with_a_cache_in_halves_answers_over_two_nodes(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", layers=4)
    with running(tmp_path, "a", "b") as nodes:
        until(lambda: all(len(node.visibility()) == 2 for node in nodes))
        env = {"COVEY_URL": nodes[0].url, "COLUMNS": "400"}
        taken = []
        for kind in ("f32", "f16"):
            placed = CliRunner().invoke(app, ["place", str(model), "--nodes", "2", "--kv-cache", kind], env=env)
            assert placed.exit_code == 0, placed.output
            [instance] = nodes[1].get("/cluster")["instances"]
            assert instance["kv_cache"] == kind
            taken.append(sum(stage["memory_bytes"] for stage in instance["stages"]))
            assert nodes[1].ask(str(model), "hello", max_tokens=60)
            assert ("KV cache f16" in CliRunner().invoke(app, ["ps"], env=env).output) is (kind == "f16")
            nodes[0].delete(f"/instance/{instance['instance_id']}")
            until(lambda: not nodes[0].runners())
        assert taken[1] < taken[0]
        refused = httpx.post(
            f"{nodes[0].url}/place_instance", json={"model_id": str(model), "kv_cache": "q8"}, timeout=30
        )
        assert refused.status_code == 400
