"""Settings: one tree from a file, the environment and the command line, and what it says when something is wrong."""

from pathlib import Path

import pytest

from forebay import config
from forebay.errors import SetupError


def load(text: str, tmp_path: Path, environment: dict[str, str] | None = None, **overrides: object) -> config.Settings:
    path = tmp_path / "forebay.toml"
    path.write_text(text, encoding="utf-8")
    return config.load(path, environment or {}, overrides)


def test_without_anything_the_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = config.load(None, {})
    assert settings == config.Settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)


def test_the_environment_goes_before_the_file_and_the_command_line_before_both(tmp_path: Path) -> None:
    text = 'host = "a"\nport = 1\n[http]\nbody_bytes_max = 10'
    environment = {"FOREBAY_PORT": "2", "FOREBAY_HTTP_BODY_BYTES_MAX": "20", "PATH": "/bin"}
    settings = load(text, tmp_path, environment, port=3, host=None)
    assert (settings.host, settings.port, settings.http.body_bytes_max) == ("a", 3, 20)


def test_an_empty_variable_is_an_unset_one(tmp_path: Path) -> None:
    assert load("port = 1", tmp_path, {"FOREBAY_PORT": "", "FOREBAY_ADMIN_KEY": ""}).port == 1


@pytest.mark.parametrize(
    ("setting", "items"),
    [
        ("quotas.defaults", ("requests=10000/day", "tokens=1/day")),
        ("media.fetch_hosts", ("a.example", "*.b.example")),
        ("audio.fetch_hosts", ("a.example", "b.example")),
        ("outbound.allowed_networks", ("10.0.0.0/8", "fd00::/8")),
        ("intake.projects", ("web", "shop")),
    ],
)
def test_a_variable_can_hold_a_list(setting: str, items: tuple[str, ...], tmp_path: Path) -> None:
    section, key = setting.split(".")
    text = f'[{section}]\n{key} = ["{items[0]}"]'
    for value, expected in ((",".join(items), items), (f" {items[1]} ,", items[1:]), (",", ()), ("", items[:1])):
        settings = load(text, tmp_path, {config.environment_name(setting): value})
        assert getattr(getattr(settings, section), key) == expected, value


def test_what_is_wrong_in_the_list_of_a_variable_is_said(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"intake\.projects\.1"):
        load("", tmp_path, {"FOREBAY_INTAKE_PROJECTS": "web,no project"})


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("prot = 1", "prot", "port"),
        ("[http]\nbody_byte_max = 1", "http.body_byte_max", "body_bytes_max"),
        ('[models.a]\nengine = "fake"\nslot = 1', "slot", "slots"),
        ('[models.a]\nengine = "llama.cpp"\nsource = "file:a"\n[models.a.options]\nctx = 1', "ctx", "context"),
        ("[scheduller]\n", "scheduller", "scheduler"),
    ],
)
def test_an_unknown_key_is_refused_naming_the_nearest_known_one(
    text: str, key: str, nearest: str, tmp_path: Path
) -> None:
    with pytest.raises(SetupError) as refused:
        load(text, tmp_path)
    assert key in str(refused.value)
    assert f"Did you mean `{nearest}`?" in str(refused.value)


def test_an_unknown_variable_is_refused_naming_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"FOREBAY_DATADIR, which is no setting. Did you mean `FOREBAY_DATA_DIR`"):
        load("", tmp_path, {"FOREBAY_DATADIR": "x"})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("port = 70000", "`port`"),
        ("port = [", "not valid TOML"),
        ('[models.a]\nengine = "lama.cpp"', "expected tags"),
        ('[models."../a"]\nengine = "fake"', "should match pattern"),
        ('[models.a]\nengine = "llama.cpp"', "needs a `source`"),
        ('tls_key = "x"', "go together"),
        ('[intake]\ntoken_audience = "x"', "go together"),
        ('[intake]\ntoken_project = "no project"', "should match pattern"),
        ('[intake]\noutput_name = "../edited.jpg"', "no slash and no dot in front"),
        ('[intake]\nurl = "https://bucket"', "should match pattern"),
        ('admin_key = "short"', "at least 32 characters"),
        ("drain_seconds = 60", "`drain_seconds`"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(SetupError) as refused:
        load(text, tmp_path)
    assert sentence in str(refused.value)
    assert "Value error" not in str(refused.value)


def test_a_section_that_is_none_is_a_sentence_though_the_environment_reaches_into_it(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="`http`: Input should be"):
        load("http = 5", tmp_path, {"FOREBAY_HTTP_BODY_BYTES_MAX": "20"})


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="Check --config"):
        config.load(tmp_path / "none.toml", {})


def test_a_secret_never_shows_in_a_message(tmp_path: Path) -> None:
    secret = "hush-" * 5
    with pytest.raises(SetupError) as refused:
        load(f'admin_key = "{secret}"\nport = "x"', tmp_path)
    assert secret not in str(refused.value)
    settings = load(f'admin_key = "{secret * 2}"', tmp_path)
    assert secret not in repr(settings)


def test_secrets_come_from_files_and_only_from_one_place(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("k" * 40 + "\n", encoding="utf-8")
    settings = load("", tmp_path, {"FOREBAY_ADMIN_KEY_FILE": str(file), "FOREBAY_PULL_HUB_TOKEN_FILE": str(file)})
    assert settings.admin_key is not None
    assert settings.admin_key.get_secret_value() == "k" * 40
    assert settings.pull.hub_token is not None
    assert config.secrets_of(settings, {}) == ["k" * 40, "k" * 40]
    with pytest.raises(SetupError, match="Both `admin_key` and `admin_key_file`"):
        load(f'admin_key = "{"k" * 40}"', tmp_path, {"FOREBAY_ADMIN_KEY_FILE": str(file)})
    file.write_text("", encoding="utf-8")
    with pytest.raises(SetupError, match="is empty"):
        load("", tmp_path, {"FOREBAY_ADMIN_KEY_FILE": str(file)})
    with pytest.raises(SetupError, match="cannot be read"):
        load("", tmp_path, {"FOREBAY_ADMIN_KEY_FILE": str(tmp_path / "none")})


def test_the_passwords_inside_addresses_and_upstream_keys_count_as_secrets(tmp_path: Path) -> None:
    text = '[models.far]\nengine = "upstream"\noptions = { base_url = "https://far.example/v1", key_env = "FAR" }'
    environment = {"FOREBAY_DATABASE_URL": "postgresql+asyncpg://forebay:pass-word@db/forebay"}
    settings = load(text, tmp_path, environment)
    assert {"pass-word", "far-key"} <= set(config.secrets_of(settings, {"FAR": "far-key"}))
    with pytest.raises(SetupError, match="FAR that holds an upstream's key is not set"):
        config.secrets_of(settings, {})


@pytest.mark.parametrize(
    "options",
    [
        'base_url = "ftp://far.example/v1"',
        'base_url = "https://user:word@far.example/v1"',
        'base_url = "https://far.example/v1?key=word"',
        'base_url = "https://"',
        'base_url = "https://far.example/v1", headers = { "X-A" = "one\\r\\nX-B: word" }',
        'base_url = "https://far.example/v1", headers = { "X A" = "word" }',
        'base_url = "https://far.example/v1", caller_key = true, key_env = "FAR"',
        'base_url = "https://far.example/v1", caller_key = true, headers = { authorization = "word" }',
    ],
)
def test_an_upstream_that_cannot_be_is_refused_without_showing_what_was_given(options: str, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"models\.far\.upstream\.options") as refused:
        load(f'[models.far]\nengine = "upstream"\noptions = {{ {options} }}', tmp_path)
    assert "word" not in str(refused.value)


def test_an_upstream_key_that_cannot_travel_in_a_header_is_refused(tmp_path: Path) -> None:
    text = '[models.far]\nengine = "upstream"\noptions = { base_url = "https://far.example/v1", key_env = "FAR" }'
    settings = load(text, tmp_path)
    assert config.secrets_of(settings, {"FAR": " the-key\n"}) == ["the-key"]
    for value in ("two\nlines", "schlüssel"):
        with pytest.raises(SetupError, match="one line of ASCII") as refused:
            config.secrets_of(settings, {"FAR": value})
        assert value not in str(refused.value)


def test_the_tree_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config.Settings().port = 1  # type: ignore[misc]


def test_the_store_that_others_fill_has_a_secret_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("filled-by-others")
    text = f'[intake]\nsecret_access_key_file = "{tmp_path / "secret"}"\n[blobs]\nsecret_access_key = "filled-by-us"'
    assert set(config.secrets_of(load(text, tmp_path), {})) == {"filled-by-others", "filled-by-us"}
