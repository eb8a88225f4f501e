"""`covey models inspect`: a person sees what was done to the weights, and what it would cost to round them."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from hub_folders import LLAMA, bfloat16, llama_tensors, write_folder, write_tokenizer
from tiny_model import write_model
from typer.testing import CliRunner

from covey.checkpoints.blocks import KERNEL_BYTES
from covey.checkpoints.card import card_from_header
from covey.checkpoints.checkpoint import TensorReader
from covey.checkpoints.inspection import TensorKind, kinds_of, quantized_kinds
from covey.checkpoints.opening import open_checkpoint
from covey.cli.main import app
from covey.schema.ids import ModelId
from covey.schema.model import FileSource, Quantizing

GOLDEN = np.load(Path(__file__).parent / "golden" / "mlx.npz")


@pytest.fixture
def folder(tmp_path) -> Path:
    tensors = {name: bfloat16(each) for name, each in llama_tensors().items()}
    return write_folder(tmp_path / "model", LLAMA | {"eos_token_id": 0}, tensors)


def test_rounding_that_would_change_nothing_is_told(demo_model):
    done = CliRunner().invoke(app, ["models", "inspect", str(demo_model), "--quantize", "q4"])
    assert "nothing in full precision that --quantize q4 would round" in done.stdout


def by_name(kinds: list[TensorKind]) -> dict[str, TensorKind]:
    return {kind.name: kind for kind in kinds}


def test_full_precision(folder):
    kinds = by_name(kinds_of(open_checkpoint(folder)))
    assert kinds["blk.*.attn_k.weight"] == TensorKind(
        name="blk.*.attn_k.weight", type="BF16", shape=(32, 64), count=2, file_bytes=2 * 32 * 64 * 2,
        held_bytes=2 * 32 * 64 * 4, held_as="exact: float32",
    )  # fmt: skip


@pytest.mark.parametrize("quantize", [None, *Quantizing])
def test_in_memory_it_is_what_placement_counts(folder, quantize):
    """A tied embedding is in the file once, and held twice: as a table, and as the matrix of the output."""
    header = open_checkpoint(folder)
    with TensorReader(folder) as reader:
        kinds = kinds_of(header) if quantize is None else quantized_kinds(header, reader, quantize)
    card = card_from_header(header, ModelId("tied"), FileSource(str(folder)))
    placed = next((each for each in card.quantized if each.quantize is quantize), card)
    total = sum(placed.layer_bytes) + placed.embedding_bytes + placed.output_bytes
    assert sum(kind.held_bytes for kind in kinds) == total
    tied, table = by_name(kinds)["output.weight"], by_name(kinds)["token_embd.weight"]
    assert (tied.file_bytes, tied.count, tied.shape) == (0, 1, table.shape)
    assert tied.held_as == f"{table.held_as}, the embedding's again"


def test_full_precision_made_small(folder):
    with TensorReader(folder) as reader:
        kinds = by_name(quantized_kinds(open_checkpoint(folder), reader, Quantizing.Q4))
    rounded = kinds["blk.*.ffn_up.weight"]
    assert rounded.held_as == "rounded: 4-bit codes in blocks of 32"
    assert rounded.held_bytes == 2 * (128 * 64 // 2 + 128 * 64 // 32 * (4 + 8))
    assert rounded.error == pytest.approx(0.085, rel=0.1)
    assert kinds["output_norm.weight"].error is None
    assert kinds["output_norm.weight"].held_as == "exact: float32"


def test_codes_are_held_as_codes(tmp_path):
    tensors = {name: each for name, each in llama_tensors().items() if "layers" not in name}
    for name, kind in (("weight", "words"), ("scales", "scales"), ("biases", "biases")):
        tensors[f"model.layers.0.mlp.up_proj.{name}"] = GOLDEN[f"6.64.{kind}"]
    config = LLAMA | {"quantization": {"group_size": 64, "bits": 6}}
    header = open_checkpoint(write_folder(tmp_path / "model", config, tensors))
    kind = by_name(kinds_of(header))["blk.*.ffn_up.weight"]
    assert kind.held_as == "exact: 8-bit codes in blocks of 64 with offsets"
    assert kind.held_bytes == 3 * 256 + 3 * 4 * KERNEL_BYTES


def test_the_command(folder, tmp_path):
    run = CliRunner().invoke
    lines = run(app, ["models", "inspect", str(folder)]).stdout.splitlines()
    assert lines[0].split() == ["tensor", "count", "type", "shape", "in", "the", "file", "in", "memory", "held"]
    assert any("blk.*.attn_q.weight" in line and "exact: float32" in line for line in lines)
    rows = json.loads(run(app, ["models", "inspect", str(folder), "--quantize", "q8", "--json"]).stdout)
    assert {row["name"]: row for row in rows}["blk.*.ffn_down.weight"]["error"] < 0.006
    for arguments, said in (
        ([str(tmp_path / "absent.gguf")], "absent.gguf can't be read: No such file or directory."),
        ([str(tmp_path)], "can't be used: it has no config.json"),
        (["~nobody-has-this-name/model.gguf"], "~nobody-has-this-name/model.gguf can't be read: No such file"),
        ([str(folder / "model.safetensors")], "model.safetensors can't be used: it is a part of a model"),
    ):
        done = run(app, ["models", "inspect", *arguments], env={"COLUMNS": "300"})
        assert done.exit_code == 1
        assert said in done.stderr.replace("\n", " ")
    done = run(app, ["models", "inspect", str(folder), "--quantize", "q5"])
    assert (done.exit_code, "'q5' is not one of 'q4', 'q8'" in done.stderr) == (2, True)


def test_a_model_that_can_be_run_and_those_that_cannot(folder, tmp_path):
    """Its tensors can be looked at either way; who asks for JSON gets it, and the reason beside it."""
    run = CliRunner().invoke
    write_tokenizer(folder)
    done = run(app, ["models", "inspect", str(folder), "--quantize", "q8"])
    assert (done.exit_code, "would round" in done.stdout) == (0, False)
    assert f"llama, {LLAMA['num_hidden_layers']} layers (--tensor 2" in done.stdout
    done = run(app, ["models", "inspect", str(write_model(tmp_path / "part.gguf"))], env={"COLUMNS": "300"})
    assert (done.exit_code, "part.gguf can't be run: the model file lacks its tensor" in done.stderr) == (1, True)
    path = tmp_path / "strange.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.ssm_in.weight", np.zeros((4, 32), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    said = f"{path} can't be run: this model is of the architecture 'mamba'; this engine knows gemma2, "
    for options in ([], ["--json"]):
        done = run(app, ["models", "inspect", str(path), *options], env={"COLUMNS": "300"})
        assert done.exit_code == 1
        assert "blk.*.ssm_in.weight" in done.stdout
        assert said in done.stderr.replace("\n", " ")
