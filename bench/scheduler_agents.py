# SPDX-License-Identifier: Apache-2.0
"""The load process of `p2pdist bench scheduler`: thousands of agents on one epoll, and what they notice.

Run as a program: connects all agents, lets them pull one image, prints a JSON object a second and at last the
findings. It decodes of the scheduler's messages only what it acts on, so that one core of it keeps one core of
the scheduler busy; how late its own timers were is in the findings, for a late generator measures itself.
"""

from __future__ import annotations

import heapq
import json
import resource
import select
import socket
import sys
import time
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, cast

import msgpack

from bench.scheduler_meter import Findings, SchedulerMeter
from bench.scheduler_model import (
    AWAY_S,
    CHURN_RATIO,
    CHURN_WITHIN_S,
    MANIFEST_TYPE,
    MISSING_AFTER_S,
    MISSING_CHUNKS,
    MISSING_RATIO,
    ORIGIN_LATENCY_S,
    REGISTRY,
    REPOSITORY,
    TAG,
    TRAIL_S,
    Image,
    Origin,
    Plan,
    arrival_s,
    longest_s,
    peer_id,
)
from p2pdist.core.chunkmap import chunk_set, to_bytes
from p2pdist.core.lease import NEVER, RENEW_S
from p2pdist.core.packing import pack_indices
from p2pdist.core.wire import (
    VERSION,
    Ask,
    Checksums,
    Done,
    Failed,
    Hello,
    Join,
    Lease,
    Leave,
    Message,
    Missing,
    Neighbours,
    Renew,
    Resolve,
    Resolved,
    Stored,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.scheduler_model import Blob
    from p2pdist.core.types import Digest

_QUESTION = 1
_HEADER_BYTES = 5
_CODE_AT = 6
"""Of a frame: after its header and msgpack's byte for a short array; codes are under 128 and so one byte."""
_RECEIVE_BYTES = 256 * 1024
_GREETING_AT_ONCE = 100
_CONNECT_S = 5.0
_PATIENCE_S = 30.0
"""For the agents to finish, past the time that the origin and their links take."""
_SPARE_FILES = 64
_PEER_PORT = 5051


class Agent:
    """One agent's connection and pull."""

    __slots__ = (
        "blocked",
        "greeted",
        "inbox",
        "joins",
        "number",
        "outbox",
        "peer_id",
        "resolving",
        "session",
        "sock",
        "started",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.peer_id = peer_id(number)
        self.sock: socket.socket | None = None
        self.session = 0
        """Counts connections: what was meant for an earlier one is dropped."""
        self.inbox = bytearray()
        self.outbox = bytearray()
        self.blocked = False
        self.greeted = False
        self.started = False
        self.joins: dict[Digest, float] = {}
        """Blobs that it wants: when it asked for their neighbours, 0 once they came."""
        self.resolving = 0.0


class Load:
    """All agents. `run` returns the findings."""

    def __init__(self, plan: Plan, address: tuple[str, int], meter: SchedulerMeter) -> None:
        self.image = Image(plan)
        self.findings = Findings()
        self._plan = plan
        self._address = address
        self._meter = meter
        self._rng = Random(plan.seed)
        self._origin = Origin(plan.origin_mbit, self._rng)
        self._agents = [Agent(number) for number in range(plan.agents)]
        self._by_fd: dict[int, Agent] = {}
        self._epoll = select.epoll()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_number = 0
        self._waiting: dict[Digest, list[tuple[Agent, int, float]]] = {digest: [] for digest in self.image.blobs}
        self._stored_frames = {digest: encode(Stored([digest])) for digest in self.image.blobs}
        self._unleased_since: list[float] = []
        self._answered_at = 0.0
        self._began = 0.0
        self._unfinished = plan.agents

    # ---------------------------------------------------------------- phases

    def run(self) -> Findings:
        """Connect all agents, let them pull, and return what was seen."""
        self._meter.sample()
        began = time.monotonic()
        self._greet_all()
        self.findings.connect_s = time.monotonic() - began
        self._settle(1.0)
        self._meter.begin()
        self._began = time.monotonic()
        self._start_all()
        self._run_while(lambda: self._unfinished > 0, self._began + longest_s(self._plan) + _PATIENCE_S)
        self.findings.finished_s = time.monotonic() - self._began
        self._meter.sample()
        self.findings.failed_agents += self._unfinished
        return self.findings

    def _greet_all(self) -> None:
        greeted = 0
        for first in range(0, len(self._agents), _GREETING_AT_ONCE):
            group = self._agents[first : first + _GREETING_AT_ONCE]
            for agent in group:
                self._connect(agent)
            self._run_while(
                lambda group=group: not all(agent.greeted for agent in group),  # type: ignore[misc]
                time.monotonic() + _CONNECT_S,
            )
            greeted += sum(agent.greeted for agent in group)
            self._meter.progress(connected=greeted)
        if greeted < len(self._agents):
            raise SystemExit(f"the scheduler took in only {greeted} of {len(self._agents)} agents")

    def _settle(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._run_while(lambda: True, until)
        self._meter.idle()

    def _start_all(self) -> None:
        now = time.monotonic()
        for agent in self._agents:
            start = now + self._rng.uniform(0, self._plan.spread_s)
            self._at(start, partial(self._resolve, agent))
            if self._rng.random() < CHURN_RATIO:
                away = start + self._rng.uniform(0, CHURN_WITHIN_S)
                self._at(away, partial(self._go_away, agent, self._rng.random() < 0.5))

    # ------------------------------------------------------------- the loop

    def _at(self, when: float, call: Callable[[], None]) -> None:
        self._timer_number += 1
        heapq.heappush(self._timers, (when, self._timer_number, call))

    def _run_while(self, condition: Callable[[], bool], until: float) -> None:
        while condition() and (now := time.monotonic()) < until:
            due = self._timers[0][0] if self._timers else until
            for fd, events in self._epoll.poll(max(0.0, min(due, until, now + 0.05) - now), 256):
                agent = self._by_fd.get(fd)
                if agent is not None:
                    if events & select.EPOLLOUT:
                        self._flush(agent)
                    if events & ~select.EPOLLOUT:
                        self._receive(agent)
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                when, _, call = heapq.heappop(self._timers)
                self.findings.lag_s.append(now - when)
                call()
            if self._meter.due(now):
                self._meter.sample()
                self._meter.progress(finished=self._plan.agents - self._unfinished)

    # ---------------------------------------------------------- connections

    def _connect(self, agent: Agent) -> None:
        sock = socket.create_connection(self._address, timeout=_CONNECT_S)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        agent.sock = sock
        agent.session += 1
        agent.greeted = False
        self._by_fd[sock.fileno()] = agent
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        host = f"10.{agent.number >> 16 & 255}.{agent.number >> 8 & 255}.{agent.number & 255}"
        self._send(agent, Hello(VERSION, "default", agent.peer_id, _PEER_PORT, "", "", host))

    def _hang_up(self, agent: Agent) -> None:
        if agent.sock is not None:
            self._epoll.unregister(agent.sock.fileno())
            del self._by_fd[agent.sock.fileno()]
            agent.sock.close()
            agent.sock = None
        agent.inbox.clear()
        agent.outbox.clear()
        agent.blocked = False
        agent.session += 1

    def _send(self, agent: Agent, *messages: Message) -> None:
        self._send_frames(agent, b"".join([encode(message) for message in messages]), len(messages))

    def _send_frames(self, agent: Agent, data: bytes, count: int) -> None:
        if agent.sock is None:
            return
        self.findings.messages_sent += count
        self.findings.bytes_sent += len(data)
        agent.outbox += data
        if not agent.blocked:
            self._flush(agent)

    def _flush(self, agent: Agent) -> None:
        assert agent.sock is not None
        try:
            sent = agent.sock.send(agent.outbox)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._lost(agent)
            return
        del agent.outbox[:sent]
        blocked = bool(agent.outbox)
        if blocked != agent.blocked:
            agent.blocked = blocked
            self._epoll.modify(agent.sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if blocked else 0))

    def _lost(self, agent: Agent) -> None:
        """Note that the scheduler hung up."""
        self._hang_up(agent)
        self._give_up()

    def _give_up(self) -> None:
        self.findings.failed_agents += 1
        self._unfinished -= 1

    def _receive(self, agent: Agent) -> None:
        assert agent.sock is not None
        try:
            data = agent.sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost(agent)
            return
        self.findings.bytes_received += len(data)
        agent.inbox += data
        session = agent.session
        while len(agent.inbox) >= _HEADER_BYTES and agent.session == session:
            stop = 4 + int.from_bytes(agent.inbox[:4], "big")
            if len(agent.inbox) < stop:
                return
            code, body = agent.inbox[_CODE_AT], agent.inbox[_HEADER_BYTES:stop]
            del agent.inbox[:stop]
            self.findings.messages_received += 1
            if code != Checksums.CODE:
                fields = cast("list[Any]", msgpack.unpackb(body))
                self._heard(agent, code, fields[1:])

    def _heard(self, agent: Agent, code: int, fields: list[Any]) -> None:
        if code == Hello.CODE:
            agent.greeted = True
        elif code == Neighbours.CODE:
            self._introduced(agent, fields[0])
        elif code == Lease.CODE:
            self._leased(agent, self.image.blobs[fields[0]], fields[1])
        elif code == Ask.CODE:
            self._at(time.monotonic() + ORIGIN_LATENCY_S, partial(self._answer, agent, agent.session))
        elif code == Resolved.CODE:
            self._resolved(agent)

    # ------------------------------------------------------------- the pull

    def _resolve(self, agent: Agent) -> None:
        if agent.sock is not None:
            agent.resolving = time.monotonic()
            self._send(agent, Resolve(_QUESTION, REGISTRY, REPOSITORY, TAG))

    def _answer(self, agent: Agent, session: int) -> None:
        """Tell the scheduler what the origin said of the tag."""
        if agent.session == session:
            self._answered_at = time.monotonic()
            manifest = self.image.manifest
            self._send(agent, Resolved(_QUESTION, manifest.digest, MANIFEST_TYPE, manifest.chunks.size_bytes))
            self._join(agent, [manifest])

    def _resolved(self, agent: Agent) -> None:
        # While an agent asks the origin the others wait for that: it is not the scheduler's time.
        now = time.monotonic()
        self.findings.resolve_s.append(now - max(agent.resolving, self._answered_at))
        self._join(agent, [self.image.manifest])

    def _join(self, agent: Agent, blobs: list[Blob]) -> None:
        now = time.monotonic()
        frames = []
        for number, blob in enumerate(blobs):
            agent.joins[blob.digest] = now
            blob.joined = True
            frames.append(encode(self._join_message(blob, sorted(blob.done) if agent.session > 1 else [])))
            arrival = now + arrival_s(self._plan, blob, blobs[:number])
            if blob.complete:
                self._at(arrival, partial(self._store, agent, agent.session, blob))
            else:
                self._waiting[blob.digest].append((agent, agent.session, arrival))
        self.findings.joins += len(blobs)
        self._send_frames(agent, b"".join(frames), len(frames))
        if len(blobs) > 1 and self._rng.random() < MISSING_RATIO:
            self._at(now + MISSING_AFTER_S, partial(self._miss, agent, agent.session))

    def _join_message(self, blob: Blob, have: list[int]) -> Join:
        """Return a newcomer's Join, or with `have` that of an agent that comes back."""
        bitmap = to_bytes(chunk_set(have), blob.chunks.count)
        checksums = b"".join(blob.checksum(index) for index in have)
        return Join(blob.digest, blob.chunks.size_bytes, REGISTRY, bitmap, checksums)

    def _introduced(self, agent: Agent, blob: Digest) -> None:
        since = agent.joins.get(blob)
        if since:
            agent.joins[blob] = 0.0
            now = time.monotonic()
            self.findings.join_s.append(now - since)
            self._note_start(agent, blob, now)

    def _note_start(self, agent: Agent, blob: Digest, now: float) -> None:
        if not agent.started and blob != self.image.manifest.digest:
            agent.started = True
            self.findings.started_s = now - self._began

    def _store(self, agent: Agent, session: int, blob: Blob) -> None:
        """Let the agent have all of a blob, and want what a manifest names."""
        if agent.session != session or agent.joins.pop(blob.digest, None) is None:
            return
        self._send_frames(agent, self._stored_frames[blob.digest], 1)
        if blob is self.image.manifest:
            self._join(agent, self.image.contents)
        elif not agent.joins:
            self._unfinished -= 1

    def _go_away(self, agent: Agent, politely: bool) -> None:
        if agent.sock is None or not agent.joins:
            return
        if politely:
            self._send(agent, *(Leave(digest) for digest in agent.joins))
        self._hang_up(agent)
        self._at(time.monotonic() + AWAY_S, partial(self._come_back, agent))

    def _come_back(self, agent: Agent) -> None:
        wanted = [self.image.blobs[digest] for digest in agent.joins]
        try:
            self._connect(agent)
        except OSError:
            self._give_up()
        else:
            self._join(agent, wanted)

    # --------------------------------------------------------------- leases

    def _leased(self, agent: Agent, blob: Blob, index: int) -> None:
        now = time.monotonic()
        if self._unleased_since:
            self.findings.lease_s.append(now - self._unleased_since.pop(0))
        self.findings.leases += 1
        self.findings.leasing_s = now - self._began
        self._note_start(agent, blob.digest, now)
        blob.leased.add(index)
        if index in blob.done:
            self._done(agent, agent.session, blob, index)
        elif blob.digest not in agent.joins:
            self._send(agent, Failed(blob.digest, index, NEVER))
        else:
            ready = self._origin.fetch(blob.chunks.length(index), now)
            self._at(ready, partial(self._done, agent, agent.session, blob, index))
            if ready - now > RENEW_S:
                self._at(now + RENEW_S, partial(self._renew, agent, agent.session, blob, index))

    def _done(self, agent: Agent, session: int, blob: Blob, index: int) -> None:
        if agent.session != session:
            return
        now = time.monotonic()
        if self.image.leasable:
            self._unleased_since.append(now)
        self._send(agent, Done(blob.digest, blob.chunks.size_bytes, index, blob.checksum(index)))
        blob.done.add(index)
        if blob.complete:
            for waiter, waiting_session, arrival in self._waiting[blob.digest]:
                ready = max(arrival, now + self._rng.uniform(*TRAIL_S))
                self._at(ready, partial(self._store, waiter, waiting_session, blob))
            self._waiting[blob.digest].clear()

    def _renew(self, agent: Agent, session: int, blob: Blob, index: int) -> None:
        if agent.session == session:
            self._send(agent, Renew(blob.digest, index))

    def _miss(self, agent: Agent, session: int) -> None:
        if agent.session != session:
            return
        for digest in agent.joins:
            some = sorted(self.image.blobs[digest].done)[:MISSING_CHUNKS]
            if some:
                self._send(agent, Missing(digest, pack_indices(some)))


def allow_files(wanted: int) -> None:
    """Raise the soft limit of open files as far as it goes; end the program if that is too low."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SystemExit(f"{wanted} open files are needed and {hard} allowed: raise the hard limit (ulimit -Hn)")


def main(plan_json: str, host: str, port: str, pid: str) -> None:
    """Run one plan against the scheduler process `pid`."""
    plan = Plan(**json.loads(plan_json))
    allow_files(plan.agents + _SPARE_FILES)
    meter = SchedulerMeter(int(pid))
    load = Load(plan, (host, int(port)), meter)
    findings = load.run()
    print(json.dumps({"result": findings.figures(plan, load.image, meter.usage(plan.spread_s))}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
