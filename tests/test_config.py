"""Settings: every field is described and used, and every way to set one wrongly is named."""

import ast
import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner import config
from captioner.config import (
    Config,
    EvaluateConfig,
    FullTuning,
    LoraTuning,
    fields,
    load,
    load_json,
    shown,
    values,
)
from captioner.errors import ConfigError

REPO = Path(__file__).resolve().parent.parent
SOURCES = [
    file
    for folder in ("captioner", "loops")
    for file in (REPO / folder).rglob("*.py")
    if "config" not in file.parts
]
UNREAD: frozenset[str] = frozenset()  # dotted fields that no code reads yet


def test_every_field_is_described() -> None:
    assert [name for name, info in fields() if not info.description] == []


def test_every_field_is_read_outside_config() -> None:
    read = {
        node.attr
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    names = {name for name, _ in fields()}
    unread = {name for name in names if name.rpartition(".")[2] not in read}
    assert unread - UNREAD == set(), "settings that do nothing"
    assert UNREAD - unread == set(), "settings that are read by now"


@pytest.mark.parametrize("toml", sorted((REPO / "loops").rglob("*.toml")), ids=lambda path: path.name)
def test_shipped_toml_loads(toml: Path) -> None:
    load(toml)


@pytest.mark.parametrize("name", ["sft", "qa", "golden", "dpo", "iterate", "evaluate", "caption"])
def test_toml_of_a_command_has_the_defaults(name: str) -> None:
    """Who copies the file and who writes none start from the same settings."""
    toml = REPO / "loops" / f"{name}.toml"
    assert load(toml) == Config()
    assert len(tomllib.loads(toml.read_text())) > 0


def test_stages_have_training_defaults_of_their_own() -> None:
    """However a part of a section is given: as a file, as flags, or from Python."""
    for made in (
        load(None, {"qa.training.seed": "3"}),
        Config.model_validate({"qa": {"training": {"seed": 3}}}),
    ):
        assert made.qa.training == Config().qa.training.model_copy(update={"seed": 3})
        assert made.qa.training.max_steps != made.sft.training.max_steps
    sampling = Config.model_validate({"caption": {"sampling": {"seed": 1}}}).caption.sampling
    assert sampling.temperature == 0.0
    lora = Config.model_validate({"sft": {"tuning": {"type": "lora"}}}).sft.tuning
    assert lora == LoraTuning()


def test_a_renamed_field_names_its_new_name(tmp_path: Path) -> None:
    """From the command line, a file, and the config that a run of 0.1 stored."""
    for end, new in config.RENAMED.items():
        section, _, leaf = end.rpartition(".")
        old = {"training": "dpo.training", "tuning": "sft.tuning"}.get(section, section) + f".{leaf}"
        with pytest.raises(ConfigError) as error:
            load(None, {old: "7"})
        renamed = f"{old.rpartition('.')[0]}.{new}"
        assert error.value.what == f"{old} is now called {renamed}"
        assert error.value.fix == f"--{renamed} 7"
    toml = tmp_path / "a.toml"
    toml.write_text("[sft.training]\nbatch_size = 4\n")
    with pytest.raises(ConfigError, match=r"now called sft.training.per_device_train_batch_size\n.*line 2"):
        load(toml)
    stored = tmp_path / "config.json"
    stored.write_text(json.dumps({"sft": {"training": {"steps": 3}}}))
    with pytest.raises(ConfigError, match=r"made by captioner 0\.1: sft\.training\.steps is now called"):
        load_json(stored)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lr", "sft.training.learning_rate"),
        ("dpo.lr", "dpo.training.learning_rate"),
        ("qa.training.lr", "qa.training.learning_rate"),
        ("sft.epochs", "sft.training.num_train_epochs"),
        ("sft.training.grad_accum", "sft.training.gradient_accumulation_steps"),
        ("dpo.training.warmup_steps", "dpo.training.warmup_ratio"),
        ("golden.max_new_tokens", "golden.max_tokens"),
        ("golden.num_generations", "golden.samples"),
        ("caption.temperature", "caption.sampling.temperature"),
        ("sft.lora_r", "sft.tuning.r"),
        ("model.torch_dtype", "model.dtype"),
        ("gate.max_recal_loss", "gate.max_recall_loss"),
    ],
)
def test_hints_name_the_field_that_is_meant(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(None, {typed: "1"})
    assert error.value.fix == f"did you mean {meant}?"


def test_the_field_that_every_synonym_stands_for_exists() -> None:
    leaves = {name.rpartition(".")[2] for name, _ in fields()}
    renamed = {name.rpartition(".")[2] for name in config.RENAMED.values()}
    assert set(config.SYNONYMS.values()) | renamed <= leaves
    assert not set(config.SYNONYMS) & leaves - {"n"}


def test_precedence(tmp_path: Path) -> None:
    toml = tmp_path / "a.toml"
    toml.write_text("[dpo]\nbeta = 0.3\nce_weight = 0.5\n")
    base = load(None, {"dpo.beta": "0.2", "dpo.golden_sft_steps": "7", "dpo.ce_weight": "2"})
    config = load(toml, {"dpo.ce_weight": "0.7"}, base)
    dpo = config.dpo
    assert (dpo.beta, dpo.ce_weight, dpo.golden_sft_steps, dpo.tuning) == (0.3, 0.7, 7, Config().dpo.tuning)


def test_text_values() -> None:
    config = load(
        None,
        {
            "sft.validation": "none",
            "sft.data": "images/a, scenes:sft:8",
            "views.levels": "[1, 3]",
            "views.center": "false",
            "views.size": "64",
        },
    )
    assert config.sft.validation is None
    assert config.sft.data == ("images/a", "scenes:sft:8")
    assert (config.views.levels, config.views.center, config.views.size) == ((1, 3), False, 64)


def test_another_kind_of_section_starts_from_its_own_defaults() -> None:
    base = load(None, {"sft.tuning.vision_width": "5"})
    config = load(None, {"sft.tuning.init": "random", "sft.tuning.type": "full"}, base)
    assert config.sft.tuning == FullTuning(init="random")
    same_kind = load(None, {"sft.tuning.type": "adapters"}, base)
    assert same_kind.sft.tuning == base.sft.tuning


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"dpo.betta": "1"}, ["unknown field dpo.betta", "--dpo.betta 1", "did you mean dpo.beta?"]),
        ({"sft.learning_rate": "1"}, ["did you mean sft.training.learning_rate?"]),
        ({"view.center": "true"}, ["did you mean views.center?"]),
        ({"qqqqqqqq": "1"}, ["unknown field qqqqqqqq", "--help"]),
        ({"sft.training": "1"}, ["a section", "sft.training.max_steps"]),
        ({"dpo.beta": "x"}, ["dpo.beta = 'x'", "valid number", "--dpo.beta x", "Rafailov"]),
        ({"views.levels": "1,b"}, ["views.levels = 'b'", "--views.levels 1,b"]),
        ({"views.levels": "0"}, ["views.levels", "greater than or equal to 1"]),
        ({"sft.tuning.type": "ful"}, ["sft.tuning.type = 'ful'", "'adapters', 'lora', 'parts', 'full'"]),
        ({"sft.tuning.init": "random"}, ["not a field of that sft.tuning.type", "--sft.tuning.init random"]),
        (
            {"sft.tuning.vision_width": "-1"},
            ["sft.tuning.vision_width = '-1'", "--sft.tuning.vision_width -1"],
        ),
        (
            {"golden.drop": "0.9", "golden.keep": "0.6"},
            ["golden: drop must not lie above keep", "--golden.drop 0.9"],
        ),
    ],
)
def test_wrong_flag(overrides: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(None, overrides)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[dpo]\n\nbetta = 1\n", ["unknown field dpo.betta", "a.toml line 3", "dpo.beta"]),
        ("seed = 'x'\n", ["seed = 'x'", "a.toml line 1"]),
        ("[sft.training]\nmax_steps = 0\n", ["sft.training.max_steps = 0", "a.toml line 2"]),
        ("[sft]\ntraining.max_steps = 0\n", ["sft.training.max_steps = 0", "a.toml line 2"]),
        ("dpo = {beta = -1}\n", ["dpo.beta = -1", "a.toml"]),
        ("dpo = 3\n", ["dpo is a section"]),
        ("[[dpo]]\nbeta = 1\n", ["dpo is a section"]),
        ("[dpo\n", ["not a TOML file", "a.toml"]),
    ],
)
def test_wrong_toml(tmp_path: Path, text: str, parts: list[str]) -> None:
    toml = tmp_path / "a.toml"
    toml.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(toml)
    for part in parts:
        assert part in str(error.value)


def test_missing_and_binary_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "no.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load(tmp_path / "b.toml")


def test_stored_config_of_another_version(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"dpo": {"gamma": 1}}')
    with pytest.raises(ConfigError) as error:
        load_json(file)
    assert "unknown field dpo.gamma" in str(error.value) and "config.json" in str(error.value)
    file.write_text("{")
    with pytest.raises(ConfigError, match="cannot read the stored config"):
        load_json(file)


def test_every_value_can_be_typed() -> None:
    """What `--dry-run` shows can be typed back as flags and gives the same config."""
    config = load(None, {"views.levels": "1,2,3", "sft.validation": "none", "qa.holdout": "0.3"})
    assert load(None, {name: shown(value) for name, value in values(config)}) == config


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 1  # type: ignore[misc]
    assert EvaluateConfig().bootstrap == Config().evaluate.bootstrap


@settings(deadline=None)  # the machine may be busy
@given(st.dictionaries(st.sampled_from([name for name, _ in fields()]), st.text(max_size=8), max_size=3))
def test_any_text_is_accepted_or_named(overrides: dict[str, str]) -> None:
    try:
        load(None, overrides)
    except ConfigError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"qa.training.early_stopping_patience": "2"}, "no validation loss"),
        ({"dpo.training.early_stopping_patience": "2"}, "no validation loss"),
        ({"sft.training.early_stopping_patience": "2", "sft.validation": "none"}, "needs a validation loss"),
        ({"dpo.tuning.placement": "sequential"}, "must be parallel"),
        ({"qa.tuning.placement": "houlsby"}, "must be parallel"),
        ({"qa.tuning.type": "full", "qa.tuning.init": "random"}, "must be pretrained"),
        ({"dpo.tuning.type": "full", "dpo.tuning.init": "random"}, "must be pretrained"),
        ({"qa.language_width": "8"}, r"now called qa\.tuning\.language_width"),
    ],
)
def test_a_field_that_a_training_cannot_keep_is_refused_at_the_start(told: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(None, told)
