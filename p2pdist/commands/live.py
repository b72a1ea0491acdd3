# SPDX-License-Identifier: Apache-2.0
"""The live display of a pull: a row per blob with bar, bytes, rate, and where the bytes came from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from p2pdist.commands.progress import describe, human_bytes, label

if TYPE_CHECKING:
    from types import TracebackType
    from typing import TextIO

    from p2pdist.core.types import Descriptor, Split


class Live:
    """See `progress.Display`."""

    live = True

    def __init__(self, stream: TextIO) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(binary_units=True),
            _Rate(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=Console(file=stream),
        )
        self._rows: dict[str, TaskID] = {}

    def __enter__(self) -> Live:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def expect(self, blobs: tuple[Descriptor, ...]) -> None:
        for blob in blobs:
            self._rows[blob.digest] = self._progress.add_task(label(blob), total=blob.size_bytes, note="")

    def moved(self, blob: Descriptor, arrived_bytes: int) -> None:
        self._progress.update(self._rows[blob.digest], completed=arrived_bytes)

    def source(self, blob: Descriptor, split: Split) -> None:
        self._progress.update(self._rows[blob.digest], note=describe(split))

    def done(self, blob: Descriptor, note: str) -> None:
        self._progress.update(self._rows[blob.digest], completed=blob.size_bytes, note=note)


class _Rate(ProgressColumn):
    """Bytes per second, in the units of everything else here."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{human_bytes(speed)}/s" if speed else "", style="progress.data.speed")
