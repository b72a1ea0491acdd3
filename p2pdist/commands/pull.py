# SPDX-License-Identifier: Apache-2.0
"""`p2pdist pull`: an image through a mirror, every byte checked, into an OCI layout or nowhere."""

from __future__ import annotations

import os
import platform as machine_platform
from pathlib import Path

import click


@click.command()
@click.argument("image", metavar="REGISTRY/REPO:TAG|@DIGEST")
@click.option(
    "--mirror", metavar="URL", envvar="P2PDIST_MIRROR", help="The mirror to ask. [default: this node's agent]"
)
@click.option("--output", metavar="oci:DIR", help="Write an OCI layout. [default: verify and discard]")
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", help="Of a multi-platform image. [default: this machine's]")
@click.option("--all-platforms", is_flag=True, help="Pull every platform of a multi-platform image.")
def pull(image: str, mirror: str | None, output: str | None, platform: str | None, all_platforms: bool) -> None:
    """Pull an image through an agent, and check the SHA-256 of all of it."""
    import trio

    from p2pdist.commands.layout import OciLayout
    from p2pdist.commands.mirror_client import MirrorClient
    from p2pdist.commands.progress import choose_display
    from p2pdist.commands.transfer import Pulled, pull_image, summary
    from p2pdist.commands.urls import agent_url
    from p2pdist.core.oci import parse_image_reference, parse_platform, platform_of_machine

    if platform and all_platforms:
        raise click.UsageError("--platform and --all-platforms exclude each other")
    reference = parse_image_reference(image)
    wanted = parse_platform(platform) if platform else platform_of_machine(machine_platform.machine())
    layout = OciLayout(_directory(output)) if output else None
    if mirror and not mirror.startswith(("http://", "https://")):
        raise click.BadParameter(f"{mirror!r} is not a URL such as http://127.0.0.1:5050", param_hint="--mirror")
    url = mirror or agent_url("mirror_listen", os.environ)

    async def run() -> Pulled:
        with choose_display() as display:
            async with MirrorClient(url) as client:
                return await pull_image(client, reference, None if all_platforms else wanted, layout, display)

    click.echo(summary(reference, trio.run(run)))


def _directory(output: str) -> Path:
    scheme, colon, directory = output.partition(":")
    if scheme != "oci" or not colon or not directory:
        raise click.BadParameter(f"{output!r} is not oci:DIR", param_hint="--output")
    return Path(directory)
