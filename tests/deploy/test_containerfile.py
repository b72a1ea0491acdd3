# SPDX-License-Identifier: Apache-2.0
"""The recipe of the image: what it copies is there, what it runs needs no shell, and what runs is not root."""

from __future__ import annotations

import json
import tomllib

import yaml

from tests.deploy.conftest import ROOT

RECIPE = ROOT / "deploy/Containerfile"


def stages() -> list[list[tuple[str, str]]]:
    """Return each stage's instructions; what comes before the first FROM is left out."""
    found: list[list[tuple[str, str]]] = []
    for line in RECIPE.read_text().splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            found.append([])
        if instruction and not instruction.startswith("#") and found:
            found[-1].append((instruction, rest))
    return found


def given(stage: list[tuple[str, str]], instruction: str) -> list[str]:
    return [rest for name, rest in stage if name == instruction]


def test_what_is_copied_from_the_tree_is_there() -> None:
    build, _ = stages()
    copied = [source for rest in given(build, "COPY") for source in rest.split()[:-1]]
    assert [source for source in copied if not (ROOT / source).exists()] == []


def test_all_that_the_wheel_is_built_from_is_copied() -> None:
    build, _ = stages()
    copied = {source for rest in given(build, "COPY") for source in rest.split()[:-1]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *(source.partition("/")[0] for source in wheel["shared-data"])}
    assert {*needed, "pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]} <= copied


def test_nothing_goes_through_a_shell() -> None:
    for stage in stages():
        for instruction in ("RUN", "ENTRYPOINT", "CMD"):
            for rest in given(stage, instruction):
                assert all(isinstance(word, str) for word in json.loads(rest))


def test_what_runs_is_the_charts_user_and_not_root() -> None:
    (user,) = given(stages()[-1], "USER")
    values = yaml.safe_load((ROOT / "deploy/helm/p2pdist/values.yaml").read_text())
    assert user == f"{values['agent']['runAsUser']}:{values['agent']['runAsUser']}"
    assert values["scheduler"]["runAsUser"] == values["agent"]["runAsUser"] > 0


def test_chart_and_package_have_one_version() -> None:
    chart = yaml.safe_load((ROOT / "deploy/helm/p2pdist/Chart.yaml").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert chart["appVersion"] == version
    assert f":{version} ." in RECIPE.read_text()
