# SPDX-License-Identifier: Apache-2.0
"""Reads the layers of an image that the lab has made."""

from __future__ import annotations

import gzip
import subprocess
from typing import TYPE_CHECKING

from bench.lab.images import LAYER_TAR_GZIP, LAYER_TAR_ZSTD

if TYPE_CHECKING:
    from bench.lab.images import Image
    from p2pdist.core.types import Descriptor


def tar_of(image: Image, layer: Descriptor) -> bytes:
    """Return a layer without its compression."""
    content = image.blob_path(layer).read_bytes()
    if layer.media_type == LAYER_TAR_ZSTD:
        return subprocess.run(["zstd", "-qdc"], input=content, stdout=subprocess.PIPE, check=True, timeout=60).stdout
    return gzip.decompress(content) if layer.media_type == LAYER_TAR_GZIP else content
