"""Every shipped YAML composes; every experiment passes a dry run; every documented field has a meaning."""

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from conf import entry
from conf.registry import OPTIONS
from train.config import RunConfig
from train.plan import plan

CONF = Path(__file__).parent.parent.parent / "conf"
GROUPS_OF_TRAIN = (
    "model",
    "data",
    "parallel",
    "engine",
    "optim",
    "schedule",
    "objective",
    "stage",
    "eval",
    "export",
    "logger",
    "preflight",
)
PRESETS = sorted(
    f"{group}={file.stem}" for group in (*GROUPS_OF_TRAIN, "experiment") for file in (CONF / group).glob("*.yaml")
)


def composed(*overrides: str) -> RunConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return entry.typed(compose("train", overrides=[*overrides, "dry_run=true"]), RunConfig)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_shipped_preset_composes(preset):
    with initialize_config_module("conf", version_base="1.3"):
        compose("train", overrides=[preset])


@pytest.mark.parametrize("experiment", sorted(file.stem for file in (CONF / "experiment").glob("*.yaml")))
def test_every_experiment_passes_a_dry_run(experiment):
    assert "B tokens" in plan(composed(f"experiment={experiment}"))


def test_there_are_experiments_from_a_laptop_to_a_cluster():
    assert {"demo", "pretrain_125m", "pretrain_1b", "pretrain_8b", "pretrain_70b"} <= {
        file.stem for file in (CONF / "experiment").glob("*.yaml")
    }


@pytest.mark.parametrize(("group", "name"), sorted(OPTIONS))
def test_every_key_is_documented_where_it_is_declared(group, name):
    meanings = entry.meanings(OPTIONS[group, name])
    missing = [field.name for field in dataclasses.fields(OPTIONS[group, name]) if not meanings.get(field.name)]
    assert not missing, f"{OPTIONS[group, name].__qualname__}: no line in Args for {missing}"
