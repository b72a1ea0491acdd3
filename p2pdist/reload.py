# SPDX-License-Identifier: Apache-2.0
"""Settings that change while a program runs: one immutable value, swapped as a whole on SIGHUP.

Owns: which settings may change, and that a reload happens in full or not at all. What a changed setting does is said
by the program, one line for each key (`live`). Invariants: a file that cannot be used leaves the old settings, and the
log says what to mend; a key that is not live keeps its value until a restart, and the log names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import structlog

from p2pdist.errors import P2PDistError

T = TypeVar("T")

log = structlog.get_logger(__name__)

Commit = Callable[[], None]
Prepare = Callable[[T], Commit]
"""Takes the new settings, checks what only use can check (ConfigError), and returns what puts them in force."""


def read_when_used(_settings: object) -> Commit:
    """Prepare nothing: the key is read from `Reloader.config` each time."""
    return lambda: None


class Reloader(Generic[T]):
    """The settings in force.

    Args:
        config: a frozen dataclass.
        load: reads the settings again from where they came; None where they came from nowhere.
        live: by key, how a new value comes into force.
    """

    def __init__(
        self, config: T, load: Callable[[], T] | None = None, live: Mapping[str, Prepare[T]] | None = None
    ) -> None:
        self.config = config
        self.reloads = 0
        self.failed: str | None = None
        """Why the last reload changed nothing; None while all is well."""
        self.live: dict[str, Prepare[T]] = dict(live or {})
        self._load = load

    def reload(self) -> None:
        """Read the settings again and put in force what is live. Never raises a P2PDistError."""
        if self._load is None:
            log.warning("nothing to reload: the settings came from no file")
            return
        try:
            asked = self._load()
            changed = _differences(self.config, asked)
            live = [key for key in changed if key in self.live]
            merged = dataclasses.replace(self.config, **{key: getattr(asked, key) for key in live})  # type: ignore[type-var]
            commits = [prepare(merged) for prepare in dict.fromkeys(self.live[key] for key in live)]
        except P2PDistError as error:
            self.failed = str(error)
            log.error("settings not reloaded, the old ones stay in force", why=str(error))
            return
        self.config = merged
        for commit in commits:
            commit()
        self.reloads += 1
        self.failed = None
        log.info("settings reloaded", changed=live)
        if waiting := [key for key in changed if key not in self.live]:
            log.warning("these settings change with a restart only", keys=waiting)


def _differences(old: object, new: object) -> list[str]:
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(old)  # type: ignore[arg-type]
    return [field.name for field in fields if getattr(old, field.name) != getattr(new, field.name)]
