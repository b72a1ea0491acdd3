# SPDX-License-Identifier: Apache-2.0
"""Runs a trio program that SIGINT, SIGTERM and SIGHUP end in order: cancelled, cleaned up, gone."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """A signal came."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Return what `main` returns.

    Raises:
        Interrupted: a signal came; `main` was cancelled and has ended.
    """
    return trio.run(_run, main)


async def _run(main: Callable[[], Awaitable[T]]) -> T:
    caught: list[int] = []
    results: list[T] = []
    with trio.open_signal_receiver(*_SIGNALS) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_signal, signals, nursery.cancel_scope, caught)
            results.append(await main())
            nursery.cancel_scope.cancel()
    if results:
        return results[0]
    raise Interrupted(caught[0])


async def _cancel_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope, caught: list[int]) -> None:
    # A second signal while main cleans up waits until the receiver closes, and takes effect then.
    async for number in signals:
        caught.append(number)
        scope.cancel()
