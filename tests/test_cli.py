# SPDX-License-Identifier: Apache-2.0
"""The command: its verbs, its flags, and how each kind of end looks from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

from p2pdist import cli
from p2pdist.config import Address, AgentConfig, RegistryConfig
from p2pdist.errors import ConfigError, P2PDistError, StoreError
from p2pdist.options import configured

if TYPE_CHECKING:
    from click.testing import Result

ROOT = Path(__file__).parent.parent
CONTRACT_FLAGS = (
    "--config FILE",
    "--mirror-listen HOST:PORT",
    "--peer-listen HOST:PORT",
    "--admin-listen HOST:PORT",
    "--scheduler HOST:PORT",
    "--data-dir DIR",
    "--registry NAME=URL",
    "--site TEXT",
    "--rack TEXT",
    "--no-mdns",
    "--join TOKEN",
    "--upload-limit TEXT",
    "--download-limit TEXT",
    "--origin-limit TEXT",
)


def invoke(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli.main, arguments, env=env)


def ending_with(error: BaseException) -> Result:
    """Run a verb that ends with `error`, below the group that maps errors."""

    @click.command()
    def verb() -> None:
        raise error

    class OneVerb(cli.Verbs):
        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
            return verb

    return CliRunner().invoke(OneVerb("main"), ["verb"])


def test_help_lists_every_verb_of_the_contract() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    listed = [line.split()[0] for line in result.output.partition("Commands:")[2].splitlines() if line.strip()]
    assert set(listed) >= {"agent", "bench", "demo", "doctor", "pull", "scheduler", "setup", "status"}


def test_version_names_the_program() -> None:
    assert invoke("--version").output.startswith("p2pdist, version ")


def test_the_agents_flags_are_the_contracts() -> None:
    output = invoke("agent", "--help").output
    options = [line.strip() for line in output.partition("Options:")[2].splitlines() if line.startswith("  -")]
    assert [flag for flag in CONTRACT_FLAGS if not any(line.startswith(flag) for line in options)] == []
    assert len(options) == len(CONTRACT_FLAGS) + 1  # --help


def test_each_flags_help_gives_default_key_and_variable() -> None:
    output = " ".join(invoke("agent", "--help").output.split())
    assert "[default: 127.0.0.1:5050; key: mirror_listen; env: P2PDIST_MIRROR_LISTEN]" in output
    assert "[default: /var/lib/p2pdist; key: data_dir; env: P2PDIST_DATA_DIR]" in output


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("port 5050 is taken"), 2, "p2pdist: port 5050 is taken\n"),
        (StoreError("disk full"), 1, "p2pdist: disk full\n"),
        (P2PDistError("two\nlines"), 1, "p2pdist: two lines\n"),
        (ExceptionGroup("nursery", [StoreError("disk full")]), 1, "p2pdist: disk full\n"),
        (ExceptionGroup("outer", [ExceptionGroup("inner", [StoreError("a"), ConfigError("b")])]), 2, "p2pdist: b\n"),
        (KeyboardInterrupt(), 130, ""),
        (BaseExceptionGroup("nursery", [KeyboardInterrupt(), StoreError("x")]), 130, ""),
    ],
    ids=repr,
)
def test_an_end_on_purpose_is_one_line_and_a_code(error: BaseException, code: int, line: str) -> None:
    result = ending_with(error)
    assert (result.exit_code, result.stderr) == (code, line)


@pytest.mark.parametrize(
    "bug", [ValueError("bug"), ExceptionGroup("n", [StoreError("x"), ValueError("bug")])], ids=repr
)
def test_a_bug_is_not_hidden(bug: Exception) -> None:
    assert ending_with(bug).exception is bug


@pytest.mark.parametrize(
    ("arguments", "env", "complaint"),
    [
        (["--mirror-listen", "5050"], {}, "p2pdist: --mirror-listen: '5050' is not HOST:PORT"),
        (["--registry", "docker.io"], {}, "p2pdist: --registry: 'docker.io' is not NAME=URL"),
        (["--config", "/nonexistent.toml"], {}, "p2pdist: cannot read the configuration /nonexistent.toml"),
        ([], {"P2PDIST_CONFIG": "/nonexistent.toml"}, "p2pdist: cannot read the configuration /nonexistent.toml"),
        ([], {"P2PDIST_DEGREE": "x"}, "p2pdist: P2PDIST_DEGREE: 'x' is not a whole number"),
        ([], {"P2PDIST_DEGRE": "2"}, "p2pdist: environment: unknown variable P2PDIST_DEGRE; did you mean"),
    ],
)
def test_a_wrong_setting_ends_the_agent_with_one_line_and_code_2(
    arguments: list[str], env: dict[str, str], complaint: str
) -> None:
    result = invoke("agent", *arguments, env=env)
    assert result.exit_code == 2
    assert result.stderr.startswith(complaint)
    assert result.stderr.count("\n") == 1


def test_flags_become_settings() -> None:
    seen: list[AgentConfig] = []
    command = click.command()(configured(AgentConfig)(seen.append))
    arguments = ["--scheduler", "a:1", "--scheduler", "[::1]:2", "--no-mdns", "--registry", "reg.lab:5000=http://r"]
    result = CliRunner().invoke(command, [*arguments, "--site", "s"], env={"P2PDIST_RACK": "r7", "P2PDIST_SITE": "env"})
    assert result.exit_code == 0, result.output
    (config,) = seen
    assert config.scheduler == (Address("a", 1), Address("::1", 2))
    assert not config.mdns
    assert dict(config.registries) == {"reg.lab:5000": RegistryConfig("http://r")}
    assert (config.site, config.rack) == ("s", "r7")


def test_no_flags_leave_the_defaults() -> None:
    seen: list[AgentConfig] = []
    CliRunner().invoke(click.command()(configured(AgentConfig)(seen.append)), [])
    assert seen == [AgentConfig()]


def test_a_verb_that_cannot_be_loaded_says_so_and_spares_the_others() -> None:
    broken = cli._unloadable("demo", ImportError("No module named 'bench'"))
    group = click.Group("main", {"demo": broken}, invoke_without_command=True)
    assert "(cannot be loaded: No module named 'bench')" in CliRunner().invoke(group, ["--help"]).output
    result = CliRunner().invoke(group, ["demo", "--any", "thing"])
    assert "make venv" in str(result.exception)


def test_an_unknown_verb_is_a_usage_error() -> None:
    result = invoke("pul")
    assert result.exit_code == 2
    assert "pul" in result.stderr


def imported_by(*arguments: str) -> set[str]:
    """Return the modules that a run of the command imports, in a process of its own."""
    code = (
        "import sys\nfrom p2pdist.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"P2PDIST_DEGREE": "x"},
    )
    return set(done.stderr.split())


def test_a_verb_loads_nothing_of_the_others() -> None:
    loaded = imported_by("agent")
    assert "p2pdist.config" in loaded
    assert not loaded & {"scheduler", "bench", "rich", "p2pdist.commands.pull", "p2pdist.commands.status"}


def test_the_command_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "p2pdist", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.startswith("p2pdist, version ")
