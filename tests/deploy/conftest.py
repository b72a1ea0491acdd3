# SPDX-License-Identifier: Apache-2.0
"""What the tests of deploy/ share: Helm and kubeconform, which `go install` brings, and the schemas of Kubernetes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
GO_TOOLS = {
    "helm": "helm.sh/helm/v3/cmd/helm@v3.22.0",
    "kubeconform": "github.com/yannh/kubeconform/cmd/kubeconform@v0.8.0",
}
_DEFINITIONS = "/api/_definitions.json#/"


def go_tool(name: str) -> str:
    """Return the tool's path, or skip with the command that installs it."""
    places = [os.environ.get("GOBIN", ""), os.environ.get("GOPATH", "") + "/bin", str(Path.home() / "go/bin")]
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *places]))
    if path is None:
        pytest.skip(f"{name} is missing: go install {GO_TOOLS[name]}")
    return path


@pytest.fixture(scope="session")
def helm() -> str:
    return go_tool("helm")


@pytest.fixture(scope="session")
def kubeconform() -> str:
    return go_tool("kubeconform")


def schema_of(version: str, api_version: str, kind: str) -> dict[str, Any]:
    """Return the JSON schema of a kind, which refuses keys that Kubernetes does not know, with all that it refers to.

    Args:
        version: of Kubernetes, such as 1.34.0; the package kubernetes-validate brings each minor version's first.
    """
    package = importlib.util.find_spec("kubernetes_validate")
    assert package is not None
    assert package.origin is not None
    directory = Path(package.origin).parent / f"kubernetes-json-schema/v{version}-local-strict"
    group, _, number = api_version.rpartition("/")
    name = "-".join(filter(None, [kind.lower(), group.partition(".")[0], number]))
    definitions = json.loads(_relative(directory / "_definitions.json"))
    return {**json.loads(_relative(directory / f"{name}.json")), **definitions}


def _relative(file: Path) -> str:
    return file.read_text().replace(_DEFINITIONS, "#/")
