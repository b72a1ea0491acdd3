# SPDX-License-Identifier: Apache-2.0
"""The promises of p2pdist.core.challenge."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.challenge import Challenge, format_challenge, parse_challenges, parse_token_answer, pull_scopes
from p2pdist.errors import InvalidInput

TOKENS = st.text("abcXYZ019-_", min_size=1, max_size=8)
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)

BASIC_A = Challenge("basic", {"realm": "a"})
BEARER_B = Challenge("bearer", {"realm": "b"})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (['Basic realm="x"'], [Challenge("basic", {"realm": "x"})]),
        (
            ['Bearer realm="https://auth.example/token",service="reg",scope="repository:a:pull,push"'],
            [
                Challenge(
                    "bearer",
                    {"realm": "https://auth.example/token", "service": "reg", "scope": "repository:a:pull,push"},
                )
            ],
        ),
        (['Basic realm="a", Bearer realm="b"'], [BASIC_A, BEARER_B]),
        (["Basic realm=a", "Bearer realm=b"], [BASIC_A, BEARER_B]),
        (["Negotiate, Basic"], [Challenge("negotiate"), Challenge("basic")]),
        (["Negotiate abc==, Basic realm=x"], [Challenge("negotiate", {}, "abc=="), Challenge("basic", {"realm": "x"})]),
        ([r'Basic realm="say \"hi, you\\\""'], [Challenge("basic", {"realm": r'say "hi, you\"'})]),
        (['  ,, BEARER   REALM = "x" ,, Service=y,'], [Challenge("bearer", {"realm": "x", "service": "y"})]),
        (
            ["Bearer realm=https://auth.example/token,service=reg:5000"],
            [Challenge("bearer", {"realm": "https://auth.example/token", "service": "reg:5000"})],
        ),
        (["Bearer realm=a, realm=b"], [Challenge("bearer", {"realm": "a"})]),
        (['Basic realm="x", Bearer realm="unfinished'], [Challenge("basic", {"realm": "x"})]),
        (["realm=x"], []),
        ([""], []),
        (["\x00"], []),
    ],
)
def test_challenges_are_split_as_rfc_9110_says(values: list[str], expected: list[Challenge]) -> None:
    assert parse_challenges(values) == expected


@given(st.lists(st.tuples(TOKENS, st.dictionaries(TOKENS.map(str.lower), VALUES, min_size=1, max_size=3)), max_size=4))
def test_what_is_written_with_quotes_is_read_back(challenges: list[tuple[str, dict[str, str]]]) -> None:
    def quote(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    header = ", ".join(
        f"{scheme} " + ", ".join(f"{name}={quote(text)}" for name, text in parameters.items())
        for scheme, parameters in challenges
    )
    assert parse_challenges([header]) == [Challenge(scheme.lower(), parameters) for scheme, parameters in challenges]


@given(st.lists(st.text(st.sampled_from('Basic=", \\\tr/:\x00é'), max_size=60), max_size=4))
def test_no_header_makes_the_parser_fail(values: list[str]) -> None:
    assert len(parse_challenges(values)) <= 16


def test_a_flood_of_challenges_is_bounded() -> None:
    assert len(parse_challenges(["a, " * 10_000] * 10)) == 16


def test_the_scope_is_ours_to_pull_and_never_the_push_that_a_challenge_names() -> None:
    challenge = Challenge("bearer", {"scope": "repository:other:push,pull aws"})
    assert pull_scopes("library/app", challenge) == ("repository:library/app:pull", "aws")
    assert pull_scopes("library/app", Challenge("bearer")) == ("repository:library/app:pull",)


@pytest.mark.parametrize(
    ("answer", "token", "lifetime_s"),
    [
        ({"token": "a"}, "a", 60.0),
        ({"access_token": "b", "expires_in": 300}, "b", 300.0),
        ({"token": "a", "access_token": "b", "expires_in": None}, "a", 60.0),
        ({"token": "", "access_token": "b", "expires_in": -5}, "b", 60.0),
        ({"token": "a", "expires_in": "300"}, "a", 60.0),
        ({"token": "a", "expires_in": True}, "a", 60.0),
        ({"token": "a", "expires_in": 10**12}, "a", 3600.0),
        ({"token": "a", "expires_in": 0.001}, "a", 5.0),
    ],
)
def test_a_token_answer_gives_token_and_lifetime(answer: object, token: str, lifetime_s: float) -> None:
    parsed = parse_token_answer(json.dumps(answer).encode())
    assert (parsed.value, parsed.lifetime_s) == (token, lifetime_s)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"canary",
        b"[]",
        b'{"token": 5}',
        b'{"token": "canary\\r\\nX: y"}',
        b'{"token": "canary x"}',
        b"[" * 100_000,
    ],
)
def test_an_answer_without_a_usable_token_is_refused_without_repeating_it(body: bytes) -> None:
    with pytest.raises(InvalidInput) as refusal:
        parse_token_answer(body)
    assert "canary" not in str(refusal.value)


def test_a_token_is_not_in_its_repr() -> None:
    assert "canary" not in repr(parse_token_answer(b'{"token": "canary"}'))


@pytest.mark.parametrize(
    ("said", "passed_on"),
    [
        (
            'Bearer realm="https://a/t",service="s",scope="x",error="e"',
            'Bearer realm="https://a/t",service="s",scope="x"',
        ),
        ("bearer service=s, realm=https://a", 'Bearer realm="https://a",service="s"'),
        ('Basic realm="lab", charset="UTF-8"', 'Basic realm="lab"'),
        ('Basic realm="a\\"b"', ""),
        ('Basic realm=""', ""),
        ('Bearer service="s"', ""),
    ],
)
def test_a_challenge_is_passed_on_in_our_own_spelling(said: str, passed_on: str) -> None:
    assert format_challenge(parse_challenges([said])[0]) == passed_on


@given(st.text(max_size=60), st.text(max_size=60))
def test_what_is_passed_on_reads_back_as_one_challenge(realm: str, service: str) -> None:
    text = format_challenge(Challenge("bearer", {"realm": realm, "service": service}))
    if text:
        (back,) = parse_challenges([text])
        assert back.parameters["realm"] == realm
        assert back.parameters.get("service", service) == service
