# SPDX-License-Identifier: Apache-2.0
"""What a certificate has to say, what a join token looks like, and who is not let in."""

from __future__ import annotations

import functools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.identity import (
    MAX_REVOKED,
    RENEW_AT,
    RENEW_JITTER,
    Name,
    Revocations,
    Token,
    admit,
    encode_secret,
    name_in,
    parse_name,
    parse_revocations,
    parse_token,
    renewal_time,
    secret_hash,
)
from p2pdist.core.types import PeerId, parse_peer_id
from p2pdist.errors import IdentityRefused, InvalidInput

ANN = "a" * 32
LABELS = st.from_regex(r"[A-Za-z0-9._-]{1,63}", fullmatch=True)


@given(LABELS, st.sampled_from(["agent", "scheduler"]), LABELS)
def test_a_name_is_what_its_uri_says(cluster: str, role: str, name: str) -> None:
    ours = Name(cluster, role, name)  # type: ignore[arg-type]
    assert parse_name(str(ours)) == ours
    assert ours.peer_id == parse_peer_id(ours.peer_id)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "p2pdist://",
        "p2pdist://lab",
        "p2pdist://lab/agent",
        "p2pdist://lab/agent/",
        "p2pdist://lab/admin/x",
        "p2pdist://lab/agent/a/b",
        "p2pdist://lab/agent/x\n",
        "p2pdist://lab/agent/x?y",
        "p2pdist:///agent/x",
        "P2PDIST://lab/agent/x",
        "https://lab/agent/x",
        "p2pdist://" + "l" * 64 + "/agent/x",
    ],
)
def test_what_is_not_exactly_a_name_is_none(uri: str) -> None:
    with pytest.raises(InvalidInput):
        parse_name(uri)


@pytest.mark.parametrize(
    ("uris", "found"),
    [
        ([f"p2pdist://lab/agent/{ANN}"], True),
        (["spiffe://other/x", f"p2pdist://lab/agent/{ANN}"], True),
        ([], False),
        (["spiffe://other/x"], False),
        ([f"p2pdist://lab/agent/{ANN}", "p2pdist://lab/scheduler/s"], False),
        (["p2pdist://lab/agent/a/b"], False),
    ],
    ids=["one", "one beside another's", "none", "another's alone", "two", "malformed"],
)
def test_a_certificate_has_exactly_one_name_of_ours(uris: list[str], found: bool) -> None:
    if found:
        assert name_in(uris) == Name("lab", "agent", ANN)
    else:
        with pytest.raises(InvalidInput):
            name_in(uris)


def test_the_peer_id_is_the_names_own_and_differs_by_cluster_where_it_is_made_of_it() -> None:
    assert Name("lab", "agent", ANN).peer_id == ANN
    assert Name("lab", "agent", "node-7").peer_id != Name("lab", "agent", "node-8").peer_id
    assert Name("lab", "agent", "node-7").peer_id != Name("lab2", "agent", "node-7").peer_id


@pytest.mark.parametrize(
    ("name", "role", "expected", "reason"),
    [
        (Name("lab", "agent", ANN), "agent", None, None),
        (Name("lab", "agent", ANN), "agent", ANN, None),
        (Name("lab", "scheduler", "s"), "scheduler", None, None),
        (Name("lab2", "agent", ANN), "agent", None, "other-cluster"),
        (Name("lab", "agent", ANN), "scheduler", None, "role"),
        (Name("lab", "scheduler", "s"), "agent", None, "role"),
        (Name("lab", "agent", ANN), "agent", "b" * 32, "other-name"),
        (Name("lab", "agent", "c" * 32), "agent", None, "revoked"),
        (Name("lab", "scheduler", "c" * 32), "scheduler", None, None),
    ],
    ids=[
        "an agent",
        "the agent that was dialled",
        "a scheduler",
        "another cluster",
        "an agent that plays scheduler",
        "a scheduler that plays agent",
        "another agent than was dialled",
        "revoked",
        "revoked in the other role only",
    ],
)
def test_who_is_let_in(name: Name, role: str, expected: str | None, reason: str | None) -> None:
    def ask() -> None:
        wanted = PeerId(expected) if expected else None
        admit(name, cluster="lab", role=role, revoked=frozenset({f"agent/{'c' * 32}"}), expected=wanted)  # type: ignore[arg-type]

    if reason is None:
        ask()
        return
    with pytest.raises(IdentityRefused) as caught:
        ask()
    assert caught.value.reason == reason
    assert caught.value.mend


def test_a_token_survives_being_written_down_and_does_not_show_its_secret() -> None:
    token = Token("lab-1", encode_secret(b"s" * 16), encode_secret(b"k" * 32))
    assert parse_token(f" {token}\n") == token
    assert token.secret not in repr(token)
    assert token.secret not in secret_hash(token.secret)


@pytest.mark.parametrize("text", ["", "x", "lab:short:short", "lab:" + "s" * 22, f"la/b:{'s' * 22}:{'k' * 43}"])
def test_what_is_no_token_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_token(text)
    assert not text or f"{text!r}" not in str(caught.value)


@given(st.frozensets(LABELS, max_size=20), st.integers(0, 1 << 40))
def test_a_list_of_revoked_names_is_read_as_it_was_written(names: frozenset[str], number: int) -> None:
    revocations = Revocations("lab", number, frozenset(f"agent/{name}" for name in names))
    assert parse_revocations(revocations.encode()) == revocations


def test_each_revocation_makes_a_newer_list_up_to_the_bound() -> None:
    first = Revocations("lab").with_name(f"agent/{ANN}")
    assert (first.number, first.names) == (1, {f"agent/{ANN}"})
    assert first.with_name("scheduler/s").number == 2
    with pytest.raises(InvalidInput):
        first.with_name("admin/x")
    with pytest.raises(InvalidInput, match="new cluster"):
        Revocations("lab", 1, frozenset(f"agent/{i}" for i in range(MAX_REVOKED))).with_name("agent/x")


PATHS = st.frozensets(LABELS.map(lambda name: f"agent/{name}"), max_size=5)


@given(st.lists(st.tuples(st.integers(0, 9), PATHS), min_size=2, max_size=5), st.randoms())
def test_lists_are_joined_to_the_same_names_in_whatever_order(
    lists: list[tuple[int, frozenset[str]]], rng: random.Random
) -> None:
    def joined() -> Revocations:
        return functools.reduce(Revocations.merged, [Revocations("lab", *each) for each in lists])

    first = joined()
    rng.shuffle(lists)
    assert joined().names == first.names == frozenset().union(*(names for _, names in lists))
    assert first.merged(first) == first
    assert Revocations("lab", *lists[0]).merged(Revocations("lab", *lists[1])) == Revocations("lab", *lists[1]).merged(
        Revocations("lab", *lists[0])
    )


def test_lists_that_come_to_too_many_names_are_not_joined() -> None:
    many = Revocations("lab", 1, frozenset(f"agent/{number}" for number in range(MAX_REVOKED)))
    with pytest.raises(InvalidInput, match="new cluster"):
        many.merged(Revocations("lab", 1, frozenset({"agent/x"})))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b'{"cluster":"lab","number":1}',
        b'{"cluster":"lab","number":"1","revoked":[]}',
        b'{"cluster":"lab","number":1,"revoked":["x"]}',
        b'{"cluster":"lab","number":1,"revoked":[1]}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_list_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        parse_revocations(data)


def test_certificates_are_renewed_at_about_half_of_their_life_and_not_all_at_once() -> None:
    rng = random.Random(1)
    times = [renewal_time(1000.0, 2000.0, rng) for _ in range(200)]
    half = RENEW_JITTER / 2
    assert min(times) >= 1000 + 1000 * (RENEW_AT - half)
    assert max(times) <= 1000 + 1000 * (RENEW_AT + half)
    assert max(times) - min(times) > 900 * RENEW_JITTER
