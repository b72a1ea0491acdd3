# SPDX-License-Identifier: Apache-2.0
"""The command-line flags of a settings class: made from its fields, so that help, file and README agree."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import click

from p2pdist.config import default_text, environment_name, load

T = TypeVar("T")


def configured(cls: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Return a decorator that gives a click command the flags of `cls` and calls it with the loaded settings.

    Below `@click.command()`: `--config FILE` (or P2PDIST_CONFIG), and each field that names a flag.
    """

    def decorate(function: Callable[[T], None]) -> Callable[..., None]:
        return reloadable(cls)(functools.wraps(function)(lambda again: function(again())))

    return decorate


def reloadable(cls: type[T]) -> Callable[[Callable[[Callable[[], T]], None]], Callable[..., None]]:
    """Return a decorator as `configured` does, whose command is called with what loads the settings, each time anew."""

    def decorate(function: Callable[[Callable[[], T]], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(config_file: Path | None, **flags: object) -> None:
            function(functools.partial(load, cls, file=config_file, environ=os.environ, flags=flags))

        hints = get_type_hints(cls)
        decorated: Callable[..., None] = command
        for field in reversed(dataclasses.fields(cls)):  # type: ignore[arg-type]
            if field.metadata["flag"]:
                decorated = _option(field, hints[field.name])(decorated)
        return click.option(
            "--config",
            "config_file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            envvar="P2PDIST_CONFIG",
            help="Settings in TOML. [env: P2PDIST_CONFIG]",
        )(decorated)

    return decorate


def _option(field: dataclasses.Field[Any], hint: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    flag, key = field.metadata["flag"], field.name
    default = default_text(field).replace("`", "")
    doc = field.metadata["doc"].replace("`", "")
    where = f"[default: {default}; key: {key}; env: {environment_name(key)}]"
    if hint is bool:
        negative = flag.startswith("--no-")
        return click.option(
            flag,
            key,
            is_flag=True,
            callback=lambda _context, _option, given: (not negative) if given else None,
            help=f"{doc} {where}",
        )
    return click.option(
        flag,
        key,
        multiple=get_origin(hint) in (tuple, Mapping),
        metavar=_metavar(doc, hint),
        help=f"{doc} {where}",
    )


def _metavar(doc: str, hint: object) -> str:
    """Return the form of the value, where the setting's text names one."""
    for form in ("NAME=URL", "HOST:PORT"):
        if form in doc:
            return form
    if "join token" in doc:
        return "TOKEN"
    return "DIR" if hint is Path else "TEXT"
