"""The graph: order, every problem at once, values that survive the command line."""

from dataclasses import fields, replace
from graphlib import CycleError
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from conf import entry
from launchers import lifecycle, preflight
from launchers.graph import LifecycleConfig, StageSpec, quoted
from launchers.local import Local

ROOT = Path(lifecycle.__file__).parent.parent


def life(**stages: StageSpec) -> LifecycleConfig:
    return LifecycleConfig(name="x", root="runs/x", stages=stages, launcher=Local())


def stage(*needs: str, **others) -> StageSpec:
    return StageSpec(command="json.tool", needs={f"key{i}": need for i, need in enumerate(needs)}, **others)


def test_stages_come_after_what_they_need_and_otherwise_as_listed():
    config = life(d=stage("b", "c"), c=stage("a"), b=stage("a/inside"), a=stage(), e=stage())
    assert config.problems() == []
    assert config.order() == ["a", "c", "b", "d", "e"]
    assert life(a=stage(), c=stage(), d=stage("a")).order() == ["a", "c", "d"]


def test_a_list_of_needs_and_after_are_edges_too():
    spec = StageSpec(needs={"sources": ["a", "b/model"]}, after=["c", "a"])
    assert spec.inputs() == ["a", "b", "c"]
    assert "sources=[runs/x/a,runs/x/b/model]" in spec.call(Path("runs/x"), "d")


def test_a_call_names_options_values_inputs_and_the_directory():
    spec = StageSpec(
        "train", {"init_from": "pretrain"}, options={"stage": "sft"}, set={"optim": {"lr": 0.1}, "seed": 3}
    )
    assert spec.call(Path("runs/x"), "sft") == [
        "train", "stage=sft", "optim.lr=0.1", "seed=3", "init_from=runs/x/pretrain", "run_dir=runs/x/sft",
    ]  # fmt: skip


def test_every_problem_is_named_at_once_with_key_value_and_fix():
    config = LifecycleConfig(
        name="x",
        stages={
            "pretrain": StageSpec(command="trian"),
            "sft": StageSpec(
                needs={"init_from": "pretrian"}, set={"init_from": "elsewhere", "run_dir": "mine"}, processes=0
            ),
            "Logs": StageSpec(),
        },
        launcher=Local(threads=-1),
        concurrent=0,
        restarts=-1,
    )
    told = "\n".join(map(str, config.problems()))
    for part in (
        "stages.pretrain.command=trian",
        "stages.sft.needs=pretrian: there is no such stage; did you mean 'pretrain'?",
        "stages.sft.set.init_from",
        "stages.sft.run_dir",
        "stages.sft.processes=0",
        "stages.Logs",
        "launcher.threads=-1",
        "concurrent=0",
        "restarts=-1",
    ):
        assert part in told, part


def test_a_circle_is_shown():
    config = life(a=stage("c"), b=stage("a"), c=stage("b"), d=stage())
    [problem] = config.problems()
    assert set(str(problem.found).split(" needs ")) == {"a", "b", "c"}
    with pytest.raises(CycleError):
        config.order()


@pytest.mark.parametrize(
    "value", ["null", "true", "1e5", "1_000", "nan", "Inf", "", " a ", "$x", "${oc.env:HOME}", "[a]", "{a:b}"]
)
def test_a_text_stays_a_text(value):
    assert parsed(value) == value


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))
KEYS = st.from_regex(r"[a-z]{1,5}", fullmatch=True)


@settings(max_examples=60, deadline=None)
@given(st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner)))
def test_a_value_is_the_same_after_the_command_line(value):
    assert parsed(value) == value


def parsed(value):
    return OverridesParser.create().parse_override(f"key={quoted(value)}").value()


def composed(name: str, *overrides: str) -> LifecycleConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return entry.typed(compose("lifecycle", overrides=[f"lifecycle={name}", *overrides]), LifecycleConfig)


def test_every_shipped_lifecycle_would_start_and_a_wrong_number_of_processes_would_not(tmp_path):
    checks = []
    for name in sorted(file.stem for file in (ROOT / "conf" / "lifecycle").glob("*.yaml")):
        config = composed(name, f"root={tmp_path / name}")
        missing = [str(tmp_path / name / stage) for stage in config.stages]
        for stage, spec in config.stages.items():
            checks.append(
                preflight.Check(f"{name}.{stage}", spec.call(tmp_path / name, stage), spec.processes, missing)
            )
    assert {"demo.pretrain", "smoke.verify"} <= {check.stage for check in checks}
    pretrain = next(check for check in checks if check.stage == "demo.pretrain")
    eight_bits = replace(pretrain, stage="fp8", call=[*pretrain.call, "stage.precision=fp8"])  # no machine for it here
    wrong = preflight.check([*checks, eight_bits, replace(pretrain, stage="three", processes=3)])
    assert set(wrong) == {"three"} and "parallel" in wrong["three"], wrong


@pytest.mark.parametrize("cls", [LifecycleConfig, StageSpec, Local])
def test_every_key_is_documented(cls):
    assert not {field.name for field in fields(cls)} - set(entry.meanings(cls))
