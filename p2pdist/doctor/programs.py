# SPDX-License-Identifier: Apache-2.0
"""The runtimes' own commands as the canary's puller: the truest check, as it needs no knowledge of their configuration.

Owns: which command pulls for which runtime. skopeo leaves nothing behind; with the others the image stays on the node,
so they run only where that was allowed.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile

import trio

from p2pdist.errors import P2PDistError

TIMEOUT_S = 45.0
_COMMANDS = {
    "containerd": (("crictl", "pull"),),
    "docker": (("docker", "pull", "--quiet"),),
    "nerdctl": (("nerdctl", "pull", "--quiet"),),
    "podman": (("skopeo", "copy", "--quiet"), ("podman", "pull", "--quiet")),
}


def puller_of(runtime: str) -> tuple[str, ...] | None:
    """Return the command that pulls as this runtime does, or None where there is none on this host."""
    return next((command for command in _COMMANDS.get(runtime, ()) if shutil.which(command[0])), None)


async def pull(command: tuple[str, ...], image: str) -> None:
    """Let a runtime pull an image.

    Raises:
        P2PDistError: it did not, or not within TIMEOUT_S.
    """
    with tempfile.TemporaryDirectory(prefix="p2pdist-canary-") as directory:
        target = (f"docker://{image}", f"dir:{directory}") if command[0] == "skopeo" else (image,)
        try:
            with trio.fail_after(TIMEOUT_S):
                done = await trio.run_process(
                    [*command, *target], stdout=subprocess.DEVNULL, capture_stderr=True, check=False
                )
        except trio.TooSlowError as error:
            raise P2PDistError(f"{command[0]} did not pull it within {TIMEOUT_S:.0f} s") from error
        except OSError as error:
            raise P2PDistError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise P2PDistError(f"{command[0]}: exit code {done.returncode}: {' '.join(last)[:300]}")
