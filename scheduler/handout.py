# SPDX-License-Identifier: Apache-2.0
"""Which peers to be connected to: a nearly regular random graph, the newcomer's own site first.

Pure. Simulated: a regular graph of degree 20 costs 1.07 times the bound, an irregular one 1.22 and
more origin egress (LIMITS, section 3). Each newcomer is given half the degree and dials them, so
that the degrees even out around `degree` as later ones arrive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from random import Random

    from p2pdist.core.types import PeerId

LOCAL_SHARE = 0.8
"""Of a newcomer's neighbours, at most this part from its own site: a few links must join the sites."""


def neighbours(
    newcomer: PeerId,
    candidates: Sequence[PeerId],
    degrees: Mapping[PeerId, int],
    sites: Mapping[PeerId, str],
    degree: int,
    rng: Random,
) -> list[PeerId]:
    """Return the peers that the newcomer should dial.

    Args:
        candidates: the swarm's other members, each once.
        degrees: how many neighbours each peer has been given so far.
        degree: the aim; swarms no larger than this become a full mesh.
    """
    if len(candidates) <= degree:
        return list(candidates)
    wanted = -(-degree // 2)
    shuffled = (
        rng.sample(candidates, len(candidates)) if len(candidates) <= 8 * degree else rng.sample(candidates, 8 * degree)
    )
    shuffled.sort(key=lambda peer: degrees.get(peer, 0))
    local = [peer for peer in shuffled if sites.get(peer) == sites.get(newcomer)]
    remote = [peer for peer in shuffled if sites.get(peer) != sites.get(newcomer)]
    chosen = local[: wanted if not remote else round(LOCAL_SHARE * wanted)]
    return (chosen + remote + local[len(chosen) :])[:wanted]
