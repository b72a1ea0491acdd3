# SPDX-License-Identifier: Apache-2.0
"""Lists of revoked names as they go round: which are known, and who carries them to schedulers that have not heard.

Names are only ever added, so all lists together are what counts, in whatever order and by whatever way they come. Each
copy of a CA may revoke by itself: its agents carry its list to the schedulers of the others, which join the lists.

Invariants: nothing counts that the CA has not signed; of the lists kept none is covered by another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
import trio

from p2pdist.core.identity import Revocations
from p2pdist.core.wire import Revoked
from p2pdist.errors import InvalidInput
from p2pdist.identity import certificates

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from p2pdist.identity.keeper import Keeper

log = structlog.get_logger(__name__)

MAX_LISTS = 8
"""Kept at a time: copies of a CA that have not heard of each other's revocations; and lists read lately."""
CARRY_S = 5.0
"""On average between looks at who has not heard: whoever comes first spares all the others the errand."""


class SignedLists:
    """The lists that one knows of a cluster; `revocations` is what they come to together."""

    def __init__(self, authority: bytes, cluster: str) -> None:
        self.revocations = Revocations(cluster)
        self.signed: tuple[bytes, ...] = ()
        self._authority = authority
        self._read: dict[bytes, Revocations] = {}

    def read(self, data: bytes) -> Revocations:
        """Return what a list says that the CA has signed. Raises InvalidInput."""
        found = self._read.get(data)
        if found is None:
            found = certificates.read_list(data, self._authority, self.revocations.cluster)
            while len(self._read) >= 2 * MAX_LISTS:
                del self._read[next(iter(self._read))]
            self._read[data] = found
        return found

    def take(self, data: bytes) -> bool:
        """Take a list in; return whether it is kept, for no other covers it. Raises InvalidInput."""
        new = self.read(data)
        known = {signed: self.read(signed).names for signed in self.signed}
        if not new.names or any(new.names <= names for names in known.values()):
            return False
        self.revocations = self.revocations.merged(new)
        kept = [signed for signed, names in known.items() if not names <= new.names]
        self.signed = (*kept, data)[-MAX_LISTS:]
        return True

    def pack(self) -> bytes:
        """Return all lists as one file's content: each is two lines."""
        return b"\n".join(self.signed)

    def unpack(self, data: bytes) -> None:
        """Take in the lists of a file; what is damaged is left out, and said."""
        lines = data.split(b"\n")
        for signature, body in zip(lines[::2], lines[1::2], strict=False):
            try:
                self.take(signature + b"\n" + body)
            except InvalidInput as error:
                log.error("a kept list of revoked names is left out", why=str(error))


class Courier:
    """Carries lists of revoked names to the schedulers of one agent that do not know them.

    Args:
        send: puts a message to a scheduler, by its address.
    """

    def __init__(self, keeper: Keeper, send: Callable[[str, Revoked], None], rng: Random) -> None:
        self._keeper = keeper
        self._send = send
        self._rng = rng
        self._told: dict[str, list[frozenset[str]]] = {}
        """What each connected scheduler has said, or been told, since it was connected; none covers another."""

    def connected(self, address: str) -> None:
        self._told[address] = []

    def lost(self, address: str) -> None:
        self._told.pop(address, None)

    def heard(self, address: str, signed: bytes) -> None:
        """Take in what a scheduler says. Raises RemoteProtocolError where it is no list of the cluster's."""
        self._note(address, self._keeper.heed(signed))

    async def run(self) -> None:
        """Carry until cancelled."""
        while True:
            await trio.sleep(CARRY_S * (0.5 + self._rng.random()))
            self.carry()

    def carry(self) -> None:
        """Tell each scheduler what it does not know."""
        for address in self._told:
            for signed, names in self._keeper.lists().items():
                if not any(names <= known for known in self._told[address]):
                    log.info("a scheduler is told of revoked names", scheduler=address, names=len(names))
                    self._note(address, names)
                    self._send(address, Revoked(signed))

    def _note(self, address: str, names: frozenset[str]) -> None:
        others = [known for known in self._told.get(address, []) if not known <= names]
        self._told[address] = [*others, names][-MAX_LISTS:]
