# SPDX-License-Identifier: Apache-2.0
"""Every error that p2pdist raises on purpose.

    P2PDistError
      ConfigError               a flag, variable or file key; ends the program with exit code 2
      InvalidInput              a name, digest, reference or range that no registry could accept
      ProtocolError
        LocalProtocolError      our bug: crash the task
        RemoteProtocolError     their bug: drop the peer
          FloodError            more than any honest peer says
      IdentityRefused           the other side is not who it must be: its certificate
      IntegrityError            bytes that do not match their digest or checksum
      TransferError             try another source
        PeerUnavailable
        TransferTimeout
      OriginError               the origin's refusal or failure, with its HTTP status
        NotFoundAtOrigin        404: no such manifest or blob
        DeniedByOrigin          401/403: not with what we hold
      StoreError                the data directory: full, read-only, locked
        StoreFullError          no room, even after eviction
      PullFailed                what the runtime sees: the digest and why each source failed

A class exists only where some `except` treats it differently. Programming errors stay
ValueError and AssertionError. `str(error)` is one line fit for a person: what happened, to
which image or peer, and what to do about it.
"""

from __future__ import annotations


class P2PDistError(Exception):
    """The root of the tree."""


class ConfigError(P2PDistError):
    """A setting that cannot be used; the message names the key, the value and where it came from."""


class InvalidInput(P2PDistError):
    """A name, digest, reference or range from outside that no registry could accept."""


class ProtocolError(P2PDistError):
    """A message that breaks the wire protocol."""


class LocalProtocolError(ProtocolError):
    """We were about to send what the protocol forbids."""


class RemoteProtocolError(ProtocolError):
    """The other side sent what the protocol forbids."""


class FloodError(RemoteProtocolError):
    """The other side sends more messages than any honest one would."""


class IdentityRefused(P2PDistError):
    """The other side of a connection is not let in, or does not let us in: for its certificate, or ours.

    Args:
        reason: a short word for metrics.
        why: what is wrong.
        mend: what to do about it.
    """

    def __init__(self, reason: str, why: str, mend: str) -> None:
        super().__init__(f"{why}; {mend}")
        self.reason = reason
        self.why = why
        self.mend = mend


class IntegrityError(P2PDistError):
    """Bytes that do not match their digest or checksum."""

    def __init__(self, message: str, *, expected: str = "", actual: str = "", peer: str | None = None) -> None:
        super().__init__(message)
        self.expected = expected
        self.actual = actual
        self.peer = peer


class TransferError(P2PDistError):
    """This source did not deliver; another may."""


class PeerUnavailable(TransferError):
    """No connection to the peer, or it went away."""


class TransferTimeout(TransferError):
    """The source was too slow or silent."""


class OriginError(P2PDistError):
    """The origin failed or refused.

    Args:
        message: one line naming the registry and what was asked of it.
        status_code: its HTTP status, or None where no response came (refused, time-out, TLS).
        retry_after_s: what its Retry-After said, in seconds, or None.
    """

    def __init__(self, message: str, *, status_code: int | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.retry_after_s = retry_after_s


class NotFoundAtOrigin(OriginError):
    """404: the origin has no such manifest or blob."""


class DeniedByOrigin(OriginError):
    """401 or 403: the origin refuses this with the credentials that were shown.

    Args:
        challenges: the WWW-Authenticate values to pass on to the caller whose own credentials count.
    """

    def __init__(self, message: str, *, status_code: int | None = None, challenges: tuple[str, ...] = ()) -> None:
        super().__init__(message, status_code=status_code)
        self.challenges = challenges


class StoreError(P2PDistError):
    """The data directory cannot be used as asked."""


class StoreFullError(StoreError):
    """No room for the blob, even after evicting all that may be evicted."""


class PullFailed(P2PDistError):
    """A pull ended without its content.

    Args:
        digest: the blob or manifest.
        causes: why each source failed, in the order tried.
    """

    def __init__(self, digest: str, causes: list[Exception]) -> None:
        why = "; ".join(str(cause) for cause in causes) or "no source had it"
        super().__init__(f"pull of {digest} failed: {why}")
        self.digest = digest
        self.causes = causes
