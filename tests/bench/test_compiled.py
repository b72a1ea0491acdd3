# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from bench.cli import bench
from bench.simulator import compiled
from bench.simulator.compiled import CannotCompile, command, compiled_tree, runnable

if TYPE_CHECKING:
    from pathlib import Path

NOTHING_TO_DO = (sys.executable, "-c", "")
FAILS = (sys.executable, "-c", "import sys; sys.exit('one\\np2pdist/core/pull.py:7: error: no\\nmore')")


def test_what_a_compiler_says_is_passed_on_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(CannotCompile, match=r"pull.py:7: error: no"):
        compiled_tree(tmp_path, FAILS)
    assert not list(tmp_path.iterdir())


def test_where_there_is_no_compiler_or_no_place_a_line_says_so(tmp_path: Path) -> None:
    with pytest.raises(CannotCompile, match="No such file"):
        compiled_tree(tmp_path, [str(tmp_path / "mypyc")])
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(CannotCompile, match="file"):
        compiled_tree(file / "cache", NOTHING_TO_DO)


def test_without_a_compiler_the_simulation_goes_on_uncompiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))

    result = CliRunner().invoke(bench, ["simulate", "--nodes", "4", "--image-mib", "1", "--compile"])

    assert result.exit_code == 0
    assert "not compiled" in result.output
    assert "÷ bound" in result.output


def test_the_copy_is_made_once_and_its_modules_are_the_ones_that_run(tmp_path: Path) -> None:
    tree = compiled_tree(tmp_path, NOTHING_TO_DO)
    assert compiled_tree(tmp_path, FAILS) == tree

    _, environment = command(tree, [])
    code = "import bench.simulator.swarm as swarm, p2pdist.core.pull as pull; print(swarm.__file__, pull.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.count(str(tree)) == 2


def test_of_two_runs_that_compile_at_once_one_uses_the_others_copy(tmp_path: Path) -> None:
    tree = tmp_path / f"simulator-{compiled._name()}"
    other_run = (sys.executable, "-c", f"import os; os.makedirs({str(tree / 'p2pdist')!r})")
    assert compiled_tree(tmp_path, other_run) == tree


def test_every_module_to_be_compiled_is_there(tmp_path: Path) -> None:
    listed = [name for names in compiled._MODULES.values() for name in names.split()]
    assert [module.stem for module in compiled._modules(compiled_tree(tmp_path, NOTHING_TO_DO))] == listed


def test_annotations_of_dataclasses_can_be_evaluated_at_run_time() -> None:
    source = (
        "from __future__ import annotations\n\nfrom dataclasses import dataclass\nfrom typing import TYPE_CHECKING\n\n"
        "if TYPE_CHECKING:\n    from decimal import Decimal\n\n\n@dataclass\nclass Price:\n    amount: Decimal\n"
        "    error: Exception\n"
    )
    names: dict[str, object] = {}
    exec(runnable(source), names)
    assert {"Decimal", "Exception"} <= names.keys()
    assert runnable("if TYPE_CHECKING:\n    pass\n") == "if TYPE_CHECKING:\n    pass\n"
