# SPDX-License-Identifier: Apache-2.0
"""Referrers of a manifest (signatures, SBOMs) as distribution-spec lists them, also for an origin that cannot.

Owns: the tag under which clients keep the list where a registry has no referrers API, and the filter by artifactType.
Refuses to filter a list that does not give each entry's type: the client, told that nothing was filtered, then looks
at the entries itself.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from p2pdist.core.oci import OCI_INDEX

if TYPE_CHECKING:
    from p2pdist.core.types import Digest

FILTERED = ("OCI-Filters-Applied", "artifactType")
EMPTY = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}).encode()

_HEX_MAX = 64


def fallback_tag(subject: Digest) -> str:
    """Return the tag of the index that lists the referrers of `subject`."""
    algorithm, _, digits = subject.partition(":")
    return f"{algorithm}-{digits[:_HEX_MAX]}"


def only_of_type(body: bytes, artifact_type: str) -> bytes | None:
    """Return the index with the entries of one type alone; None where an entry does not say its type, or it is none."""
    try:
        index = json.loads(body)
        entries = index["manifests"]
        types = [entry.get("artifactType") for entry in entries]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None
    if not all(isinstance(kind, str) and kind for kind in types):
        return None
    kept = [entry for entry, kind in zip(entries, types, strict=True) if kind == artifact_type]
    return json.dumps(index | {"manifests": kept}).encode()
