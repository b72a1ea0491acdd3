# SPDX-License-Identifier: Apache-2.0
"""This process's calls into the file system, each of which a hook may fail, cut short or never let return.

It is the boundary to the operating system that is hooked, the functions of `os`: all code above it is the real one.
A hook is called in the place of the function, with its name, the function itself and the arguments.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

CHANGES = (
    "open",
    "pwrite",
    "fsync",
    "posix_fallocate",
    "ftruncate",
    "rename",
    "replace",
    "unlink",
    "mkdir",
    "utime",
)
"""What changes files or names, and `open`, which may."""


class Hook(Protocol):
    """What is done where a call was to be."""

    def __call__(self, name: str, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any: ...  # noqa: ANN401  # the functions of os


@contextmanager
def hooked(hook: Hook, names: Iterable[str] = CHANGES) -> Iterator[None]:
    """Call `hook` in the place of these functions of `os`, everywhere in the process, while the context is open."""
    real = {name: getattr(os, name) for name in names}
    for name, function in real.items():
        setattr(os, name, partial(hook, name, function))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)
