"""Every setting is documented, and the commented example is a real configuration."""

import re
import tomllib
from enum import Enum
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from forebay import config, engine_options, model_config
from tests.house import source

PAGE = source.ROOT / "docs" / "configure.md"
EXAMPLE = source.ROOT / "forebay.example.toml"
SECRETS = ("admin_key", "database_url", "hub_token", "secret_access_key")

MODEL_TABLES: dict[str, type[BaseModel]] = {
    "every model": model_config.ModelSettings,
    "llama.cpp": engine_options.LlamaCppOptions,
    "onnx": engine_options.OnnxOptions,
    "whisper": engine_options.WhisperOptions,
    "speakers": engine_options.SpeakersOptions,
    "aligner": engine_options.AlignerOptions,
    "opencv": engine_options.OpencvOptions,
    "diffusion": engine_options.DiffusionOptions,
    "command": engine_options.CommandOptions,
    "vllm": engine_options.VllmOptions,
    "upstream": engine_options.UpstreamOptions,
    "fake": engine_options.FakeOptions,
}


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    match value:
        case None:
            return "none"
        case bool():
            return f"`{str(value).lower()}`"
        case str() | Path():
            return f'`"{value}"`'
        case tuple():
            return f"`{[each.value if isinstance(each, Enum) else each for each in value]}`"
        case _:
            return f"`{value}`"


def _meaning(field: FieldInfo) -> str:
    return (field.description or "").replace("|", "\\|")


def settings_table(section: str) -> str:
    """The table of docs/configure.md for one section; "" is the top of the tree."""
    rows = ["| setting | environment variable | default | meaning |", "|---|---|---|---|"]
    for name, field in config.setting_names():
        if name.rpartition(".")[0] == section:
            rows.append(f"| `{name}` | `{config.environment_name(name)}` | {_default(field)} | {_meaning(field)} |")
    return "\n".join(rows) + "\n"


def model_table(model: type[BaseModel]) -> str:
    """The table of docs/configure.md for the keys of a model or for the options of an engine."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    rows += [f"| `{name}` | {_default(field)} | {_meaning(field)} |" for name, field in model.model_fields.items()]
    return "\n".join(rows) + "\n"


SECTIONS = sorted({name.rpartition(".")[0] for name, _ in config.setting_names()})


@pytest.mark.parametrize("section", SECTIONS)
def test_the_page_has_the_settings_of(section: str) -> None:
    assert settings_table(section) in PAGE.read_text(encoding="utf-8"), f"Expected:\n\n{settings_table(section)}"


@pytest.mark.parametrize("title", MODEL_TABLES)
def test_the_page_has_the_keys_of(title: str) -> None:
    expected = model_table(MODEL_TABLES[title])
    assert expected in PAGE.read_text(encoding="utf-8"), f"Expected:\n\n{expected}"


def test_every_setting_has_a_sentence() -> None:
    fields = dict(config.setting_names())
    for title, model in MODEL_TABLES.items():
        fields |= {f"{title}.{name}": field for name, field in model.model_fields.items()}
    assert not [name for name, field in fields.items() if not (field.description or "").endswith(".")]


def _uncommented() -> str:
    """The example with every `#key = value` and `#[table]` switched on; prose is `# ` and stays a comment."""
    return re.sub(r"^#(?=[^ #\n])", "", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def _tables(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, set[str]]]:
    """Flat `section.key` values, and for each engine the options that its example shows."""
    models = tree.pop("models")
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= {f"{key}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {key: value}
    shown: dict[str, set[str]] = {"every model": {key for model in models.values() for key in model}}
    for model in models.values():
        shown.setdefault(model["engine"], set()).update(model.get("options", {}))
    return flat, shown


def test_the_example_shows_every_setting_with_its_default() -> None:
    flat, shown = _tables(tomllib.loads(_uncommented()))
    assert set(flat) == {name for name, _ in config.setting_names()}
    for name, field in config.setting_names():
        if field.default is not None:
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert flat[name] == (str(default) if isinstance(default, Path) else default), name
    for title, model in MODEL_TABLES.items():
        assert set(model.model_fields) <= shown[title] | {"engine", "options"}, title


def test_the_example_says_what_each_setting_means() -> None:
    prose = " ".join(re.findall(r"^# (.*)$", EXAMPLE.read_text(encoding="utf-8"), re.MULTILINE))
    for name, field in config.setting_names():
        assert (field.description or "?") in prose, name


def test_the_example_as_it_stands_changes_nothing() -> None:
    assert config.load(EXAMPLE, {}) == config.Settings()


@pytest.mark.parametrize("secrets", ["given", "in files"])
def test_the_example_with_everything_switched_on_is_valid(tmp_path: Path, secrets: str) -> None:
    dropped = "(?!_file)" if secrets == "in files" else "_file"
    text = re.sub(rf"^(?:{'|'.join(SECRETS)}){dropped} *=.*\n", "", _uncommented(), flags=re.MULTILINE)
    for name in SECRETS:
        secret = tmp_path / name
        secret.write_text("s" * 40, encoding="utf-8")
        text = re.sub(rf'^({name}_file *= *)".*"', rf'\1"{secret}"', text, flags=re.MULTILINE)
    path = tmp_path / "forebay.toml"
    path.write_text(text, encoding="utf-8")
    settings = config.load(path, {})
    assert {model.engine for model in settings.models.values()} == {
        "llama.cpp",
        "onnx",
        "whisper",
        "speakers",
        "aligner",
        "opencv",
        "diffusion",
        "command",
        "vllm",
        "upstream",
        "fake",
    }


def test_every_setting_of_the_example_can_be_a_variable(tmp_path: Path) -> None:
    text = re.sub(rf"^(?:{'|'.join(SECRETS)})_file *=.*\n", "", _uncommented(), flags=re.MULTILINE)
    text = re.sub(rf'^({"|".join(SECRETS)}) *= *".*"', rf'\1 = "{"s" * 40}"', text, flags=re.MULTILINE)
    path = tmp_path / "forebay.toml"
    path.write_text(text, encoding="utf-8")
    flat, _ = _tables(tomllib.loads(text))
    environment = {config.environment_name(name): _variable(value) for name, value in flat.items()}
    given = config.load(None, environment)
    assert given == config.load(path, {}).model_copy(update={"models": given.models})


def _variable(value: Any) -> str:
    """A value as it stands in an environment."""
    if isinstance(value, list):
        return ",".join(value) or ","
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_the_example_satisfies_the_schema() -> None:
    schema = config.Settings.model_json_schema()
    jsonschema.validate(tomllib.loads(EXAMPLE.read_text(encoding="utf-8")), schema)
    jsonschema.validate(tomllib.loads(_uncommented()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"no_such_setting": 1}, schema)
