"""The audit fails on what is known, says what it could not ask, and never fails for want of a network."""

import json
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tools import dependencies
from tools.dependencies import DependenciesConfig, Vulnerability

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
VULNERABLE = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0", "1.9.1"]}


@pytest.fixture
def service(monkeypatch, tmp_path):
    """Stands for pip-audit: answers for each requirement as a dictionary says; "skip" is one that is not known."""

    def start(answers: dict, known: bool = True, delay_s: float = 0.0) -> None:
        if known:
            answers = answers | {"urllib3==1.24.1": [VULNERABLE]}
        script = tmp_path / "service.py"
        script.write_text(f"""
import json, sys, time
time.sleep({delay_s})
answers, dependencies = {answers!r}, []
for requirement in open(sys.argv[-1]).read().split():
    name, version = requirement.split("==")
    found = answers.get(requirement, [])
    if found == "skip":
        dependencies.append({{"name": name, "skip_reason": "Dependency not found"}})
    else:
        dependencies.append({{"name": name, "version": version, "vulns": found}})
print(json.dumps({{"dependencies": dependencies, "fixes": []}}))
""")
        monkeypatch.setattr(dependencies, "ASK", [sys.executable, "-I", "-S", str(script)])
        monkeypatch.setattr(dependencies, "installed", lambda: {"a": "a==1.0", "b": "b==2.0"})

    return start


def run(capsys, **settings) -> tuple[int, str]:
    config = DependenciesConfig(**settings)
    assert config.problems() == []
    return dependencies.main(config, {}), "".join(capsys.readouterr())


def test_a_known_vulnerability_fails_with_package_id_and_fix(service, capsys):
    service({"b==2.0": [VULNERABLE]})
    code, told = run(capsys)
    assert code == 1 and "error: b 2.0: PYSEC-1, CVE-1; fixed in 2.0, 1.9.1" in told


def test_without_one_it_passes_and_says_how_many_were_asked_for(service, capsys):
    service({})
    assert run(capsys) == (0, "2 of 2 packages have no known vulnerability that counts\n")


@pytest.mark.parametrize("how", ["knows nothing", "knows no package", "too late", "no network"])
def test_a_service_that_is_away_or_knows_nothing_is_told_and_passes(service, capsys, monkeypatch, how):
    service(
        {"urllib3==1.24.1": "skip"} if how == "knows no package" else {}, known=False, delay_s=9 * (how == "too late")
    )
    if how == "no network":
        monkeypatch.setattr(dependencies, "ASK", [sys.executable, "-c", "raise SystemExit('Max retries exceeded')"])
    began = time.monotonic()
    code, told = run(capsys, total_s=1.0 if how == "too late" else 60.0)
    assert code == 0 and "WARNING: dependencies were NOT audited" in told and time.monotonic() - began < 8


def test_packages_that_it_does_not_answer_for_are_named(service, capsys):
    service({"b==2.0": "skip"})
    code, told = run(capsys)
    assert code == 0 and "did not answer for: b\n" in told and "1 of 2 packages" in told


def test_what_is_ignored_with_a_reason_does_not_count_until_its_day_is_over(service, capsys):
    service({"b==2.0": [VULNERABLE]})
    reason = {"reason": "not reached"}
    assert run(capsys, ignored={"CVE-1": {"until": "9999-01-01", **reason}})[0] == 0
    assert run(capsys, ignored={"CVE-1": {"until": "2020-01-01", **reason}})[0] == 1
    code, told = run(capsys, ignored={"CVE-2": {"until": "9999-01-01", **reason}})
    assert code == 1 and "CVE-2 is ignored in conf/dependencies.yaml and not found any more" in told


@pytest.mark.parametrize("why", [{}, {"until": "soon", "reason": "x"}, {"until": "2030-01-01", "reason": ""}, "x"])
def test_what_is_ignored_needs_a_day_and_a_reason(why):
    assert [problem.key for problem in DependenciesConfig(ignored={"CVE-1": why}).problems()] == ["ignored.CVE-1"]


def test_one_without_a_fix_says_so():
    assert str(Vulnerability("a 1", ("X",), ())) == "a 1: X; no fix yet"


@pytest.mark.parametrize("text", REQUIREMENTS)
def test_every_requirement_is_bounded_on_both_sides_and_installed_within(text):
    requirement = Requirement(text)
    operators = {bound.operator for bound in requirement.specifier}
    assert operators & {">=", "==", "~="} and operators & {"<", "<=", "==", "~="}, text
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return  # an extra that is not installed
    assert version.split("+")[0] in SpecifierSet(str(requirement.specifier)), f"{version} is installed"


def test_the_real_pip_audit_takes_what_it_is_given(tmp_path):
    """Its command line; without a network it ends with an error of the network."""
    (tmp_path / "none.txt").write_text("")
    done = subprocess.run(
        [*dependencies.ASK, "--vulnerability-service=pypi", "-r", str(tmp_path / "none.txt")], capture_output=True
    )
    assert json.loads(done.stdout)["dependencies"] == [], done.stderr
