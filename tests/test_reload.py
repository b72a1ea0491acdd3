# SPDX-License-Identifier: Apache-2.0
"""A reload: all of it or nothing, and what cannot change is named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from p2pdist.errors import ConfigError
from p2pdist.reload import Reloader, read_when_used

if TYPE_CHECKING:
    from p2pdist.reload import Commit


@dataclass(frozen=True)
class Settings:
    level: str = "info"
    limit: int = 1
    burst: int = 2
    port: int = 5050


class Program:
    """Something with settings: `asked` is what its file says, `done` what came into force."""

    def __init__(self) -> None:
        self.asked = Settings()
        self.done: list[str] = []
        live = {"level": self.level, "limit": self.limits, "burst": self.limits}
        self.settings = Reloader(Settings(), lambda: self.asked, live)

    def level(self, new: Settings) -> Commit:
        if new.level == "bad":
            raise ConfigError("level: 'bad' is not usable; choose another")
        return lambda: self.done.append(f"level {new.level}")

    def limits(self, new: Settings) -> Commit:
        return lambda: self.done.append(f"limits {new.limit} {new.burst}")


def test_what_has_changed_comes_into_force() -> None:
    program = Program()
    program.asked = Settings(level="debug")
    with capture_logs() as lines:
        program.settings.reload()
    assert program.done == ["level debug"]
    assert program.settings.config == Settings(level="debug")
    assert lines == [{"event": "settings reloaded", "changed": ["level"], "log_level": "info"}]
    assert (program.settings.reloads, program.settings.failed) == (1, None)


def test_keys_that_belong_together_come_into_force_once() -> None:
    program = Program()
    program.asked = Settings(limit=5, burst=6)
    program.settings.reload()
    assert program.done == ["limits 5 6"]


def test_a_key_that_is_not_live_keeps_its_value_and_is_named() -> None:
    program = Program()
    program.asked = Settings(port=6000, limit=9)
    with capture_logs() as lines:
        program.settings.reload()
    assert program.settings.config == Settings(limit=9)
    assert lines[-1]["keys"] == ["port"]
    assert lines[-1]["log_level"] == "warning"


def test_a_file_that_cannot_be_used_changes_nothing_and_says_why() -> None:
    program = Program()

    def broken() -> Settings:
        raise ConfigError("/etc/x.toml: unknown key 'limt'; did you mean 'limit'?")

    program.settings = Reloader(Settings(), broken, {"limit": program.limits})
    with capture_logs() as lines:
        program.settings.reload()
    assert (program.done, program.settings.config) == ([], Settings())
    assert "did you mean 'limit'?" in lines[0]["why"]
    assert lines[0]["log_level"] == "error"
    assert program.settings.failed == lines[0]["why"]


def test_where_one_key_cannot_come_into_force_none_does() -> None:
    program = Program()
    program.asked = Settings(limit=7, level="bad")
    program.settings.reload()
    assert (program.done, program.settings.config) == ([], Settings())
    assert program.settings.failed is not None
    program.asked = replace(program.asked, level="warning")
    program.settings.reload()
    assert program.done == ["level warning", "limits 7 2"]
    assert program.settings.failed is None


@pytest.mark.parametrize("changed", [{}, {"limit": 3}], ids=["nothing", "something"])
def test_a_key_may_be_read_when_it_is_used(changed: dict[str, int]) -> None:
    settings = Reloader(Settings(), lambda: Settings(**changed), {"limit": read_when_used})  # type: ignore[arg-type]
    settings.reload()
    assert settings.config == Settings(**changed)  # type: ignore[arg-type]


def test_settings_from_nowhere_stay() -> None:
    with capture_logs() as lines:
        Reloader(Settings()).reload()
    assert lines[0]["log_level"] == "warning"
