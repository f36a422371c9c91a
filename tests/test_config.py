from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import get_args

import pytest

from fusion.all_embeddings.config import Config
from fusion.command.settings import _element, _flag, _flags, as_flags, from_json, parse, to_json
from fusion.config import EvaluateConfig, LossName, PredictConfig
from fusion.errors import ConfigError, DataError, UsageError
from fusion.jobs import doctor, pull
from fusion.loss_functions import LOSSES
from fusion.qwen_clip.config import Config as PairConfig
from fusion.records import provenance
from fusion.verify import __main__ as verify

EARLIER = Path(__file__).with_name("earlier_config.json")


def read(*flags: str) -> Config:
    return parse(Config, flags, prog="train", description="")


def test_the_published_recipe_has_the_published_values() -> None:
    for config in (Config(recipe="published"), read("--recipe", "published")):
        assert (config.model, config.width, config.n_heads, config.n_experts) == ("fusion", 512, 8, 3)
        assert (config.hidden, config.neighbours, config.components) == ((1024, 512, 256), 0, 0)
        assert (config.dropout, config.batch_size, config.epochs, config.lr) == (0.25, 256, 1000, 1e-3)
        assert (config.input_dropout, config.input_noise, config.modality_dropout) == (0, 0, 0.05)
        assert (config.weight_decay, config.clip, config.schedule, config.patience) == (1e-4, 1.0, "plateau", 15)
        assert (config.lr_patience, config.lr_factor, config.min_lr) == (3, 0.5, 1e-6)
        assert (config.val_fraction, config.seed, config.loss) == (0.2, 41, "weighted_smape")
    assert PairConfig(recipe="published").hidden == (512, 256, 128)


def test_given_settings_take_precedence_over_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read("--recipe", "published", "--neighbours", "9", "--components", "4").neighbours == 9
    (tmp_path / "settings.toml").write_text('recipe = "published"\nwidth = 64\n')
    monkeypatch.setenv("FUSION_CONFIG", str(tmp_path / "settings.toml"))
    assert (read().width, read().dropout, read("--width", "32").width) == (64, 0.25, 32)


def test_the_default_recipe_uses_neighbours() -> None:
    config = Config()
    assert (config.recipe, config.model, config.neighbours, config.components) == ("best", "concat", 128, 256)
    assert (config.schedule, config.loss, config.patience, config.held_out()) == ("cosine", "smape", None, (0,))


@pytest.mark.parametrize(
    ("flags", "held_out"),
    [
        ("", (0,)),
        ("--seeds 3", (0, 0, 0)),
        ("--folds 3", (0, 1, 2)),
        ("--folds 3 --seeds 2", (0, 0, 1, 1, 2, 2)),
        ("--folds 3 --fold 1 --seeds 2", (1, 1)),
        ("--folds 3 --fold 0", (0,)),
    ],
)
def test_each_member_holds_out_one_fold(flags: str, held_out: tuple[int, ...]) -> None:
    assert read(*flags.split()).held_out() == held_out


def test_the_config_of_an_earlier_version_has_the_published_recipe() -> None:
    text = EARLIER.read_text()
    config = from_json(PairConfig, text, "config.json")
    assert config == PairConfig(
        recipe="published", data="s3://bucket/data", output="s3://bucket/output", width=16, hidden=(8,), epochs=3
    )
    assert (config.neighbours, config.components, config.schedule, config.held_out()) == (0, 0, "plateau", (0,))
    assert (config.input_dropout, config.input_noise, config.neighbour_dropout, config.warmup) == (0, 0, 0, 0)


@pytest.mark.parametrize(("config_class", "n_tokens"), [(Config, 2), (PairConfig, 4)])
def test_the_model_of_an_earlier_version_keeps_its_number_of_tokens(
    config_class: type[Config | PairConfig], n_tokens: int
) -> None:
    values = {name: value for name, value in json.loads(EARLIER.read_text()).items() if name != "sources"}
    for more in ({}, {"recipe": "best"}):
        assert from_json(config_class, json.dumps(values | more), "config.json").n_tokens == n_tokens
    assert Config(recipe="published").n_tokens == 1 and PairConfig(recipe="published").n_tokens == 4


def test_the_config_of_an_earlier_version_keeps_its_fold() -> None:
    values = json.loads(EARLIER.read_text())
    for fold in (0, 2):
        config = from_json(PairConfig, json.dumps(values | {"folds": 5, "fold": fold}), "config.json")
        assert config.held_out() == (fold,)


def test_flags_take_precedence_over_environment_file_and_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('epochs = 5\nlr = 0.5\nseed = 1\n[sources]\nclip_image = "from_file"\n')
    monkeypatch.setenv("FUSION_EPOCHS", "6")
    monkeypatch.setenv("FUSION_LR", "0.25")
    monkeypatch.setenv("FUSION_SOURCES_QWEN_TEXT", "from_environment")
    config = read("--epochs", "7", "--config", str(file))
    assert (config.epochs, config.lr, config.seed, config.batch_size) == (7, 0.25, 1, 256)
    assert config.bindings()["clip_image"] == "from_file"
    assert config.bindings()["qwen_text"] == "from_environment"
    monkeypatch.setenv("FUSION_CONFIG", str(file))
    assert read().seed == 1


def test_lists_and_switches_are_read_from_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read("--hidden", "8", "4").hidden == (8, 4)
    assert read("--drop-bad-prices").drop_bad_prices
    monkeypatch.setenv("FUSION_DROP_BAD_PRICES", "true")
    monkeypatch.setenv("FUSION_HIDDEN", "16,8")
    assert read().drop_bad_prices and read().hidden == (16, 8)
    assert not read("--no-drop-bad-prices").drop_bad_prices
    monkeypatch.setenv("FUSION_BY", "brand,category")
    assert parse(EvaluateConfig, [], prog="", description="").by == ("brand", "category")


def test_a_column_and_a_date_are_read_from_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--validate-after", "created", "2026-01-31"]
    config = read(*flags)
    assert config.validate_after == ("created", "2026-01-31")
    assert from_json(Config, to_json(config), "config.json") == config
    assert as_flags(Config, flags, prog="") == flags
    monkeypatch.setenv("FUSION_VALIDATE_AFTER", "first, seen,2026-01-31")
    assert read().validate_after == ("first, seen", "2026-01-31")
    with pytest.raises(UsageError, match="--validate-after: expected 2 arguments"):
        read("--validate-after", "created")


def test_a_config_survives_json_and_can_be_used_as_a_config_file(tmp_path: Path) -> None:
    config = read("--epochs", "3", "--sources.clip-image", "x", "--hidden", "8")
    assert from_json(Config, to_json(config), "config.json") == config
    (tmp_path / "config.json").write_text(to_json(config))
    assert read("--config", str(tmp_path / "config.json")) == config


def test_an_unknown_key_in_json_is_an_error() -> None:
    values = json.loads(to_json(Config())) | {"learning_rate": 1}
    with pytest.raises(ConfigError, match="learning_rate"):
        from_json(Config, json.dumps(values), "config.json")


def test_a_config_is_frozen_and_validated() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().epochs = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Config(epochs=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "concat", "--n-heads", "4"], "--n-heads has no effect with --model concat"),
        (["--model", "concat", "--n-experts", "5"], "--n-experts has no effect with --model concat"),
        (["--lr-patience", "5"], "--lr-patience has no effect with --schedule cosine"),
        (["--lr-factor", "0.1"], "--lr-factor has no effect with --schedule cosine"),
        (["--min-lr", "0.1"], "--min-lr has no effect with --schedule cosine"),
        (["--schedule", "plateau", "--warmup", "0.1"], "--warmup has no effect with --schedule plateau"),
        (["--recipe", "published", "--warmup", "0.1"], "--warmup has no effect with --schedule plateau"),
        (
            ["--neighbours", "0", "--neighbour-dropout", "0.1"],
            "--neighbour-dropout has no effect with --neighbours 0",
        ),
        (
            ["--recipe", "published", "--neighbour-dropout", "0.1"],
            "--neighbour-dropout has no effect with --neighbours 0",
        ),
        (["--folds", "5", "--val-fraction", "0.1"], "--val-fraction has no effect with --folds"),
        (
            ["--validate-after", "created", "2026-01-31", "--val-fraction", "0.1"],
            "--val-fraction has no effect with --validate-after",
        ),
    ],
)
def test_a_setting_that_cannot_take_effect_is_an_error(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*flags)
    assert caught.value.message == message and caught.value.remedy.startswith("leave out --")
    with pytest.raises(ConfigError):
        as_flags(Config, flags, prog="")


def test_a_default_without_effect_is_no_error(tmp_path: Path) -> None:
    config = read("--model", "concat", "--folds", "5")
    (tmp_path / "config.json").write_text(to_json(config))
    assert read("--config", str(tmp_path / "config.json")) == config, "the file contains all defaults"
    old = to_json(Config(model="concat", n_experts=5))
    assert from_json(Config, old, "config.json").n_experts == 5, "the config of an existing run must be readable"


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--recipe", "published"],
        ["--recipe", "published", "--lr-patience", "5", "--min-lr", "0.1"],
        ["--recipe", "published", "--schedule", "cosine", "--warmup", "0.1"],
        ["--schedule", "plateau", "--lr-factor", "0.1"],
        ["--neighbours", "0"],
        ["--recipe", "published", "--n-heads", "4", "--neighbours", "9", "--components", "9"],
        ["--recipe", "published", "--model", "concat"],
    ],
)
def test_values_of_the_recipe_do_not_count_as_given(flags: list[str], tmp_path: Path) -> None:
    config = read(*flags)
    (tmp_path / "config.json").write_text(to_json(config))
    assert read("--config", str(tmp_path / "config.json")) == config


def test_rejects_two_different_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_RUN_ID", "old")
    for settings in (EvaluateConfig, PredictConfig):
        assert parse(settings, ["--run-dir", "out/runs/old/"], prog="", description="").run_id == "old"
        with pytest.raises(ConfigError) as caught:
            parse(settings, ["--run-dir", "out/runs/new"], prog="", description="")
        assert caught.value.message == ("--run-dir is the run new, but --run-id is old; --run-id is in the environment")


def test_a_missing_config_file_is_named_with_its_flag(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist") as caught:
        read("--config", str(tmp_path / "none.toml"))
    assert caught.value.remedy == "--config, or FUSION_CONFIG, must name a JSON or TOML file"


def test_flags_are_never_abbreviated() -> None:
    with pytest.raises(UsageError, match="--epoch"):
        read("--epoch", "3")


def test_the_run_id_depends_on_settings_that_change_the_result() -> None:
    assert read().name() == read("--output", "elsewhere", "--device", "cpu").name()
    assert read().name() != read("--seed", "1").name()
    assert read().name().startswith("all-embeddings-")
    assert read("--run-id", "mine").name() == "mine"


def test_every_loss_can_be_chosen() -> None:
    assert set(get_args(LossName)) == set(LOSSES)


def test_sources_can_differ_by_fold() -> None:
    flags = ["--folds", "5", "--fold", "3", "--sources.clip-image", "clip_without_{fold}"]
    assert read(*flags).bindings()["clip_image"] == "clip_without_3"


def test_warns_of_a_misspelt_variable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("FUSION_PRECISON", "FUSION_REVISION", "FUSION_EXIT_DIR", "FUSION_MAX_CHANGE", "FUSION_HIDDEN"):
        monkeypatch.setenv(name, "1")
    parse(EvaluateConfig, [], prog="x", description="")
    (line,) = capsys.readouterr().err.splitlines()
    assert "event=unknown_variable name=FUSION_PRECISON did_you_mean=FUSION_PRECISION" in line


@pytest.mark.parametrize("seconds", ["-1", "inf", "nan"])
def test_rejects_an_invalid_store_timeout(seconds: str) -> None:
    with pytest.raises(ConfigError, match="--store-timeout is "):
        read("--store-timeout", seconds)


@pytest.mark.parametrize("name", ["OUTPUT", "DATA", "RUN_ID", "FOLDS", "EPOCHS", "SOURCES_CLIP_IMAGE", "CONFIG"])
def test_an_empty_variable_is_unset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"FUSION_{name}", "")
    assert read() == Config()


@pytest.mark.parametrize("flag", ["--output", "--data", "--run-id", "--text-column", "--sources.clip-image", "--lr"])
def test_an_empty_flag_is_an_error(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"(?m)^{flag} is empty$"):
        read(flag, "")


def test_an_empty_setting_in_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('output = ""\n')
    with pytest.raises(ConfigError, match=r"(?m)^--output is empty \(in .*settings.toml\)$"):
        read("--config", str(tmp_path / "settings.toml"))


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (verify.main, [""]),
        (verify.main, ["output", "--data", ""]),
        (pull.main, ["runs", "--output", ""]),
        (doctor.main, ["--output", ""]),
        (doctor.main, ["--data="]),
    ],
)
def test_all_commands_refuse_an_empty_url(
    main: Callable[[list[str]], int], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 78
    assert " is empty\nhint: give " in capsys.readouterr().err


def test_all_commands_treat_an_empty_variable_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FUSION_OUTPUT", "FUSION_DATA", "FUSION_STORE_TIMEOUT", "FUSION_REVISION"):
        monkeypatch.setenv(name, "")
    given = pull._parser().parse_args(["runs"])
    assert (given.output, given.store_timeout) == ("output", 60)
    given = verify._parse(["output"])
    assert (given.data, given.store_timeout) == (None, 60)
    assert provenance.revision()


@pytest.mark.parametrize(
    ("flags", "message", "remedy"),
    [
        ("--lr inf", "--lr is 'inf': input should be a finite number", "give --lr an allowed value"),
        ("--clip nan", "--clip is 'nan': input should be a finite number", "give --clip an allowed value"),
        ("--seed 4294967296", "--seed is '4294967296': input should be less than", "give --seed an allowed value"),
        ("--hidden 8 0", "--hidden is '0': input should be greater than 0", "give --hidden an allowed value"),
        ("--fold 3", "--fold is 3, but --folds is not given", "change --fold or --folds"),
        ("--sources.qwen-text a_{fold}", "the source 'a_{fold}' contains {fold}, but --folds is not", "change --folds"),
        (
            "--validate-after created 31.01.2026",
            "--validate-after 'created' has the date '31.01.2026', expected a date or timestamp such as 2026-01-31",
            "change --validate-after",
        ),
        (
            "--validate-after created 2026-01-31 --folds 5",
            "--folds and --validate-after exclude each other",
            "change --folds or --validate-after",
        ),
        (
            "--validate-after created 2026-01-31 --group-column created",
            "--validate-after and --group-column both use the column 'created'",
            "change --validate-after or --group-column",
        ),
        ("--device gpu", "--device is 'gpu': expected auto, cpu, cuda or cuda:0", "give --device an allowed value"),
        ("--width 9", "--width 9 is not divisible by --n-heads 8", "change --width or --n-heads"),
    ],
)
def test_an_invalid_value_is_named_with_its_flag(flags: str, message: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(*flags.split())
    assert raised.value.message.startswith(message) and raised.value.remedy == remedy


def test_rejects_infinite_numbers() -> None:
    for config_class in (Config, EvaluateConfig, PredictConfig):
        for key, field in _flags(config_class).items():
            if _element(field.annotation) is float:
                with pytest.raises(ConfigError, match=r"finite|less than"):
                    parse(config_class, [_flag(key), "inf"], prog="x", description="")


def test_rejects_a_name_that_cannot_be_a_folder() -> None:
    with pytest.raises(ConfigError, match="--name is "):
        parse(PredictConfig, ["--name", "n" * 101], prog="x", description="")
    with pytest.raises(ConfigError, match="--name is 'my prices/x': expected at most 100 letters"):
        parse(PredictConfig, ["--name", "my prices/x"], prog="x", description="")


def test_an_invalid_date_names_its_flag() -> None:
    with pytest.raises(ConfigError) as raised:
        parse(PredictConfig, ["--date", "2026-02-30"], prog="x", description="")
    assert re.fullmatch(r"for today: --date \d{4}-\d\d-\d\d", raised.value.remedy)


ZONES = [("Berlin", "Europe/Berlin"), ("new york", "America/New_York"), ("utc", "UTC")]


@pytest.mark.parametrize(("zone", "near"), ZONES)
def test_an_invalid_time_zone_names_a_similar_one(zone: str, near: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(PredictConfig, ["--time-zone", zone], prog="x", description="")
    assert raised.value.remedy == f"did you mean {near}? change --time-zone"


def test_a_misspelt_choice_names_a_similar_one() -> None:
    with pytest.raises(ConfigError) as raised:
        read("--loss", "smap")
    assert raised.value.remedy == "did you mean smape? give --loss an allowed value"


def test_a_yaml_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("lr: 0.1\n")
    with pytest.raises(ConfigError) as raised:
        read("--config", str(tmp_path / "settings.yaml"))
    assert raised.value.remedy == "YAML is not supported: write `lr = 0.1` into settings.toml"


def test_a_common_name_of_a_flag_gets_a_suggestion() -> None:
    with pytest.raises(UsageError) as raised:
        read("--learning-rate", "0.1")
    assert raised.value.remedy.startswith("did you mean --lr?")
