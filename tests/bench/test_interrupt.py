# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal

import pytest
import trio

from bench import interrupt


def test_what_the_program_returns_is_returned() -> None:
    async def main() -> str:
        return "done"

    assert interrupt.run(main) == "done"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_cancels_the_program_and_lets_it_clean_up(number: signal.Signals) -> None:
    cleaned_up = []

    async def main() -> None:
        try:
            os.kill(os.getpid(), number)
            await trio.sleep_forever()
        finally:
            cleaned_up.append(True)

    with pytest.raises(interrupt.Interrupted) as caught:
        interrupt.run(main)
    assert caught.value.signal == number
    assert cleaned_up == [True]


def test_an_error_of_the_program_is_passed_on() -> None:
    async def main() -> None:
        raise LookupError("missing")

    with pytest.raises(ExceptionGroup) as caught:
        interrupt.run(main)
    assert caught.group_contains(LookupError, match="missing")
