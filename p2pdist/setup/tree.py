# SPDX-License-Identifier: Apache-2.0
"""The files of a host, below a root directory: read whole, written atomically, with what they had kept.

Paths are absolute and as the host knows them; symbolic links are followed inside the root, so that a mounted
root's links never lead to this machine's files. Every failure of the system is one line that names the path.

Invariants: a file has its old content or its new one, never a part; a file that is rewritten keeps its mode, owner and
extended attributes; what is created belongs to the owner of the directory that it is in.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import deque
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from p2pdist.errors import P2PDistError

if TYPE_CHECKING:
    from collections.abc import Iterator

_LINKS_MAX = 40
_FILE_BYTES_MAX = 4 << 20
"""More than any configuration has."""


class Tree:
    """The files below `root`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root.absolute()
        if not self.root.is_dir():
            raise P2PDistError(
                f"{root} is not a directory: --root names the directory where a host's file system begins"
            )

    def real(self, path: str) -> Path:
        """Return where a path is on this machine; the file itself need not exist."""
        parts = deque(PurePosixPath(path).parts[1:])
        at, links = self.root, 0
        while parts:
            part = parts.popleft()
            if part == "..":
                at = at.parent if at != self.root else at
                continue
            at = at / part
            with _named(path):
                link = os.readlink(at) if at.is_symlink() else None
            if link is None:
                continue
            links += 1
            if links > _LINKS_MAX:
                raise P2PDistError(f"{path}: too many symbolic links; mend them first")
            target = PurePosixPath(link)
            at = self.root if target.is_absolute() else at.parent
            parts.extendleft(reversed(target.parts[1:] if target.is_absolute() else target.parts))
        return at

    def read(self, path: str) -> bytes | None:
        """Return a file's content, or None where there is no such file."""
        real = self.real(path)
        with _named(path):
            try:
                with real.open("rb") as file:
                    content = file.read(_FILE_BYTES_MAX + 1)
            except (FileNotFoundError, NotADirectoryError):
                return None
        if len(content) > _FILE_BYTES_MAX:
            raise P2PDistError(f"{path} has more than {_FILE_BYTES_MAX >> 20} MiB: that is no configuration")
        return content

    def names(self, path: str) -> list[str]:
        """Return what is in a directory, sorted; nothing where there is none."""
        real = self.real(path)
        with _named(path):
            try:
                return sorted(os.listdir(real))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def is_directory(self, path: str) -> bool:
        with _named(path):
            return self.real(path).is_dir()

    def exists(self, path: str) -> bool:
        with _named(path):
            return self.real(path).exists()

    def missing_directories(self, path: str) -> list[str]:
        """Return those of a file's directories that are not there, the outermost first."""
        parents = [str(parent) for parent in PurePosixPath(path).parents]
        return [parent for parent in reversed(parents) if not self.exists(parent)]

    def make_directory(self, path: str) -> None:
        real = self.real(path)
        with _named(path):
            with suppress(FileExistsError):
                real.mkdir()
                real.chmod(0o755)
                _own_as(real, real.parent)
            _sync(real.parent)

    def write(self, path: str, content: bytes, *, mode: int = 0o644) -> None:
        """Replace or create a file; `mode` is that of a new one. Its directory has to be there."""
        real = self.real(path)
        fresh = real.with_name(f".{real.name}.p2pdist-new")
        with _named(path):
            fresh.unlink(missing_ok=True)
            try:
                with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(content)
                    _dress(fresh, real, mode)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(fresh, real)
            except BaseException:
                fresh.unlink(missing_ok=True)
                raise
            _sync(real.parent)

    def remove(self, path: str) -> None:
        real = self.real(path)
        with _named(path):
            real.unlink(missing_ok=True)
            if real.parent.is_dir():
                _sync(real.parent)

    def remove_directory_if_empty(self, path: str) -> None:
        real = self.real(path)
        with _named(path):
            try:
                real.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR):
                    raise


def _dress(fresh: Path, real: Path, mode: int) -> None:
    """Give a new file the mode, owner and attributes of the one that it replaces."""
    if real.exists():
        owner = real.stat()
        shutil.copystat(real, fresh)
        os.utime(fresh)
        if (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
            os.chown(fresh, owner.st_uid, owner.st_gid)
            fresh.chmod(owner.st_mode & 0o7777)
    else:
        fresh.chmod(mode)
        _own_as(fresh, real.parent)


def _own_as(path: Path, parent: Path) -> None:
    owner = parent.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.chown(path, owner.st_uid, owner.st_gid)


def _sync(directory: Path) -> None:
    number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        hint = "run it as root" if os.geteuid() else "the file system may be read-only or the file immutable"
        raise P2PDistError(f"{path}: {error.strerror}; {hint}") from error
    except OSError as error:
        raise P2PDistError(f"{path}: {error.strerror or error}") from error
