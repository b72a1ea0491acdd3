# SPDX-License-Identifier: Apache-2.0
"""The simulator and the production code that it drives, compiled by mypyc: the same figures in half the time.

Only on demand (`--compile`), for runs of thousands of nodes. A copy of the packages in the user's cache directory is
compiled, named by what it was made of; the sources stay as they are. Needs a C compiler and mypy, which brings mypyc;
who calls goes on without where these are missing.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import bench
import p2pdist
import scheduler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_PACKAGES = {"p2pdist": p2pdist, "scheduler": scheduler, "bench": bench}
_MODULES = {
    # Without wire.py, which reads its own annotations: mypyc does not keep them as they are written.
    "p2pdist/core": "events chunkmap state peerbook progress select serve take lease ladder hearing membership pull"
    " verify runs racks rate reputation swap schedulers",
    "scheduler": "swarm ledger handout pace checksums tags",
    "bench/simulator": "links swarm sizes plan",
}
_KEPT = 3
"""Compiled copies; the oldest go."""
_LIMIT_S = 1200
_RECIPE = "1"
"""To be raised where this file makes something else of the same sources."""


class CannotCompile(Exception):
    """Why there is no compiled copy, in a line."""


def command(tree: Path, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command line and the environment of `p2pdist` with these arguments in a compiled copy."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    if platform.libc_ver()[0] == "glibc":
        # Thousands of agents' state in pages of 2 MiB, which Python's own allocator cannot ask for: 13% less time.
        environment |= {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    return [sys.executable, "-P", "-m", "p2pdist", *arguments], environment


def compiled_tree(cache: Path, compiler: Sequence[str] = (sys.executable, "-m", "mypyc")) -> Path:
    """Return the directory of a compiled copy of this very code, made now if there is none in `cache`.

    Raises:
        CannotCompile: mypyc or the C compiler is missing or fails, or there is no place for the copy.
    """
    tree = cache / f"simulator-{_name()}"
    if tree.is_dir():
        return tree
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="compiling-") as made:
            # mypyc names its build by its directory's contents, not by its place: it may be moved.
            copy = Path(made) / "tree"
            _copy(copy)
            _compile(copy, compiler)
            copy.rename(tree)
    except OSError as error:
        if tree.is_dir():  # another run has made it meanwhile
            return tree
        raise CannotCompile(f"{cache}: {error.strerror or error}") from error
    _forget_old(cache)
    return tree


def default_cache() -> Path:
    """Return where this user's programs keep what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "p2pdist"


def _sources() -> Iterator[tuple[str, Path]]:
    for name, package in sorted(_PACKAGES.items()):
        folder = Path(str(package.__file__)).parent
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.suffix not in (".pyc", ".so"):
                yield f"{name}/{file.relative_to(folder)}", file


def _name() -> str:
    digest = hashlib.sha256(f"{_RECIPE} {sys.version} {os.environ.get('MYPYC_OPT_LEVEL')}".encode())
    for name, file in _sources():
        digest.update(f"{name} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _copy(tree: Path) -> None:
    for name, file in _sources():
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    (tree / "mypy.ini").write_text("[mypy]\nignore_missing_imports = True\n")
    for module in _modules(tree):
        module.write_text(runnable(module.read_text()))


def _modules(tree: Path) -> list[Path]:
    named = [tree / folder / f"{name}.py" for folder, names in _MODULES.items() for name in names.split()]
    return [module for module in named if module.is_file()]


def runnable(source: str) -> str:
    """Return a module whose dataclasses' annotations can be evaluated, as mypyc does where Python does not."""
    if "@dataclass" not in source:
        return source
    lines = source.replace("\nif TYPE_CHECKING:\n", "\nif True:\n").split("\nfrom dataclasses import", 1)
    return "\nfrom builtins import Exception\nfrom dataclasses import".join(lines)


def _compile(tree: Path, compiler: Sequence[str]) -> None:
    files = [str(module.relative_to(tree)) for module in _modules(tree)]
    try:
        done = subprocess.run(
            [*compiler, *files], cwd=tree, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CannotCompile(f"mypyc took more than {_LIMIT_S} s") from error
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise CannotCompile(next((line for line in lines if "error" in line), lines[-1] if lines else "mypyc failed"))
    shutil.rmtree(tree / "build", ignore_errors=True)


def _forget_old(cache: Path) -> None:
    trees = sorted(cache.glob("simulator-*"), key=lambda tree: tree.stat().st_mtime)
    for tree in trees[:-_KEPT]:
        shutil.rmtree(tree, ignore_errors=True)
