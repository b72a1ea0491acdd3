# SPDX-License-Identifier: Apache-2.0
"""How it stands with a program's identity, in a word and a line: for health, status, doctor and metrics."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from p2pdist.identity.keeper import stamp
from p2pdist.identity.refusals import REASONS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric

    from p2pdist.identity.credentials import Identity
    from p2pdist.identity.refusals import Refusals


class State(StrEnum):
    """What is so, the worst of what is. Programs match these words (docs/identity.md)."""

    OFF = "off"
    EXPOSED = "exposed"
    OK = "ok"
    NOT_RENEWED = "not-renewed"
    ENDING = "ending"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Standing:
    """A state, and what people read of it."""

    state: State
    what: str

    def __str__(self) -> str:
        return f"{self.state}: {self.what}"


OFF = Standing(State.OFF, "nobody is authenticated, and only what anybody may read is shared")
EXPOSED = Standing(
    State.EXPOSED, "nobody is authenticated, and access rules give private content to whoever reaches the peer port"
)


def standing(identity: Identity | None, trouble: str, now: float) -> Standing:
    """Return how it stands.

    Args:
        identity: None where the program has none.
        trouble: why the last attempt at a newer certificate failed, "" if it did not.
        now: Unix seconds.
    """
    if identity is None:
        return OFF
    credential = identity.credential
    whose = f"{identity.name.path} of cluster {identity.name.cluster}"
    ends = f"until {stamp(credential.not_after)}"
    not_renewed = f"not renewed: {trouble}" if trouble else "nobody has renewed it"
    if identity.name.path in identity.revocations.names:
        return Standing(State.REVOKED, f"{whose} is revoked: nobody in the cluster talks to it")
    if now >= credential.not_after:
        return Standing(State.EXPIRED, f"the certificate of {whose} was good {ends}; {not_renewed}")
    if now > credential.late_at:
        return Standing(State.ENDING, f"{whose}, {ends}: less than a third of its life is left; {not_renewed}")
    if trouble:
        return Standing(State.NOT_RENEWED, f"{whose}, {ends}; {not_renewed}")
    return Standing(State.OK, f"{whose}, {ends}")


def document(identity: Identity | None, now: Standing, refusals: Refusals) -> dict[str, object]:
    """Return what a status says of it."""
    return {
        "name": str(identity.name) if identity is not None else None,
        "state": now.state,
        "what": now.what,
        "ends": stamp(identity.credential.not_after) if identity is not None else None,
        "revoked": len(identity.revocations.names) if identity is not None else 0,
        "refused": dict(refusals.counts),
    }


def metrics(identity: Identity | None, refusals: Refusals) -> Iterator[Metric]:
    """Yield when the certificate ends, if there is one, and whom a program has kept out."""
    ends = GaugeMetricFamily(
        "p2pdist_identity_ends_timestamp_seconds", "When the certificate in force ends, Unix time.", labels=()
    )
    revoked = GaugeMetricFamily("p2pdist_identity_revoked_names", "Names that are revoked in the cluster.", labels=())
    if identity is not None:
        ends.add_metric((), identity.credential.not_after)
        revoked.add_metric((), len(identity.revocations.names))
    yield from (ends, revoked)
    refused = CounterMetricFamily(
        "p2pdist_connections_refused", "Connections that came to nothing for a certificate.", labels=["reason"]
    )
    for reason in REASONS:
        refused.add_metric([reason], refusals.counts[reason])
    yield refused
