"""`python -m tools.dependencies`: known vulnerabilities of the installed packages, by pip-audit.

It fails on a vulnerability that is known, never on a service that is away. Whether the service knows anything is asked
first: some mirrors of the package index answer for every package, without a word on vulnerabilities.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from importlib import metadata
from typing import Any

from packaging.utils import canonicalize_name

from conf import entry
from conf.errors import Problem
from conf.registry import register

SAFE, VULNERABLE = 0, 1
KNOWN = "urllib3==1.24.1"
"""Vulnerable, as every service knows (CVE-2019-11324 and others)."""
AT_ONCE = 8
"""Processes; they wait for the network most of the time."""
ASK = [sys.executable, "-m", "pip_audit", "--format=json", "--progress-spinner=off", "--desc=off"]
ASK += ["--no-deps", "--disable-pip"]


@register("", "dependencies_schema")
@dataclass(frozen=True)
class DependenciesConfig:
    """Look for known vulnerabilities of the installed packages.

    Args:
        service: who is asked: pypi or osv.
        timeout_s: longest wait for an answer, in seconds.
        total_s: longest wait for all, in seconds; packages that were not answered for by then are named.
        ignored: vulnerability id -> {until, reason}: those that do not concern us, as ISO 8601 date and in words. After
            that day they count again.
    """

    service: str = "pypi"
    timeout_s: int = 5
    total_s: float = 20.0
    ignored: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> list[Problem]:
        found = []
        if self.service not in ("pypi", "osv"):
            found.append(Problem("service", self.service, "pypi or osv"))
        for name, why in self.ignored.items():
            try:
                date.fromisoformat(str(why["until"]))
                given = bool(why["reason"])
            except (KeyError, TypeError, ValueError):
                given = False
            if not given:
                found.append(Problem(f"ignored.{name}", why, "{until: 2027-01-01, reason: why it does not concern us}"))
        return found


@dataclass(frozen=True)
class Vulnerability:
    """One that is known of an installed package.

    Args:
        package: name and version.
        ids: what it is called by the services.
        fixed: versions without it.
    """

    package: str
    ids: tuple[str, ...]
    fixed: tuple[str, ...]

    def __str__(self) -> str:
        fix = f"fixed in {', '.join(self.fixed)}" if self.fixed else "no fix yet"
        return f"{self.package}: {', '.join(self.ids)}; {fix}"


@dataclass(frozen=True)
class Answer:
    """What the service said.

    Args:
        asked: packages it answered for.
        vulnerabilities: those it knows.
    """

    asked: frozenset[str]
    vulnerabilities: tuple[Vulnerability, ...]


def installed() -> dict[str, str]:
    """Name -> requirement of every package in this environment; ours and local builds are asked for as published."""
    found = {}
    for distribution in metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        if name != "longrun":
            found[name] = f"{name}=={distribution.version.split('+')[0]}"
    return dict(sorted(found.items()))


def ask(requirements: Sequence[str], config: DependenciesConfig, until_s: float) -> Answer:
    """Ask the service; what it cannot be asked about is not in the answer."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(requirements) + "\n")
        file.flush()
        command = [*ASK, f"--vulnerability-service={config.service}", f"--timeout={config.timeout_s}", "-r", file.name]
        try:
            left_s = max(until_s - time.monotonic(), 0.1)
            told = subprocess.run(command, capture_output=True, text=True, timeout=left_s).stdout
            listed = json.loads(told)["dependencies"]
        except (subprocess.TimeoutExpired, json.JSONDecodeError, KeyError, TypeError):
            return Answer(frozenset(), ())  # no network, or an answer that is none
    answered = [one for one in listed if "skip_reason" not in one]
    return Answer(
        frozenset(canonicalize_name(one["name"]) for one in answered),
        tuple(
            Vulnerability(
                f"{one['name']} {one['version']}",
                (found["id"], *found.get("aliases", ())),
                tuple(found.get("fix_versions", ())),
            )
            for one in answered
            for found in one["vulns"]
        ),
    )


def counted(found: Sequence[Vulnerability], ignored: Mapping[str, Any], today: date) -> list[Vulnerability]:
    """Those that are not ignored, or not any more."""
    valid = {name for name, why in ignored.items() if date.fromisoformat(str(why["until"])) >= today}
    return [one for one in found if not valid & set(one.ids)]


def main(config: DependenciesConfig, resolved: dict[str, Any]) -> int:
    until_s = time.monotonic() + config.total_s
    packages = installed()
    if not ask([KNOWN], config, until_s).vulnerabilities:
        print(
            f"WARNING: dependencies were NOT audited. {config.service} cannot be reached from here, or knows no "
            f"vulnerability at all (it has none of {KNOWN}). Where it can be, run: python -m tools.dependencies",
            file=sys.stderr,
        )
        return SAFE
    requirements = list(packages.values())
    with ThreadPoolExecutor(AT_ONCE) as threads:
        parts = [requirements[first::AT_ONCE] for first in range(AT_ONCE)]
        answers = list(threads.map(lambda part: ask(part, config, until_s), [part for part in parts if part]))
    asked = frozenset[str]().union(*(answer.asked for answer in answers))
    found = [one for answer in answers for one in answer.vulnerabilities]
    counting = counted(found, config.ignored, date.today())
    if silent := sorted(packages.keys() - asked):
        print(f"WARNING: not audited, {config.service} did not answer for: {', '.join(silent)}", file=sys.stderr)
    for name in config.ignored:
        if not any(name in one.ids for one in found):
            print(f"note: {name} is ignored in conf/dependencies.yaml and not found any more", file=sys.stderr)
    for one in counting:
        print(f"error: {one}", file=sys.stderr)
    if counting:
        print(
            "Raise bounds in pyproject.toml, or say in conf/dependencies.yaml why it does not concern us.",
            file=sys.stderr,
        )
        return VULNERABLE
    print(f"{len(asked)} of {len(packages)} packages have no known vulnerability that counts")
    return SAFE


if __name__ == "__main__":
    entry.run("dependencies", DependenciesConfig, main)
