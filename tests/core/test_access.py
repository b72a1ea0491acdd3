# SPDX-License-Identifier: Apache-2.0
"""Which rule holds for a repository, and what is kept of a caller."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from p2pdist.core.access import NOBODY, AccessRule, Caller, Policy, TagRule
from p2pdist.core.types import Repository
from p2pdist.errors import InvalidInput

SECRET = "canary-4711"


@pytest.mark.parametrize(
    ("registry", "repository", "named", "matches"),
    [
        ("*", "*", "docker.io/library/alpine", True),
        ("docker.io", "*", "docker.io/library/alpine", True),
        ("docker.io", "library/*", "docker.io/library/alpine", True),
        ("docker.io", "library/*", "docker.io/libraryx/alpine", False),
        ("docker.io", "library/*", "docker.io/library/deep/er", True),
        ("docker.io", "library", "docker.io/library/alpine", False),
        ("docker.io", "*", "xdocker.io/library/alpine", False),
        ("docker.io", "*", "dockerXio/library/alpine", False),
        ("*.lab", "*", "reg.lab/a", True),
        ("*.lab", "*", "lab/a", False),
        ("reg.lab:*", "*", "reg.lab:5000/a", True),
        ("reg.lab", "*", "reg.lab:5000/a", False),
        ("*", "*/secret", "reg.lab/team/secret", True),
        ("*", "*/secret", "reg.lab/team/secrets", False),
    ],
)
def test_a_glob_matches_whole_names(registry: str, repository: str, named: str, matches: bool) -> None:
    rule = AccessRule(registry, repository, "deny")
    assert rule.matches(Repository(*named.split("/", 1))) is matches


def test_the_first_rule_that_matches_wins_and_none_means_what_anybody_may_read() -> None:
    first = AccessRule("reg.lab", "team/open", "public")
    second = AccessRule("reg.lab", "team/*", "passthrough")
    tags = (TagRule("reg.lab", "team/*", "pinned"), TagRule("*", "*", "stale-if-error"))
    policy = Policy((first, second), tags)
    assert policy.access_to(Repository("reg.lab", "team/open")) is first
    assert policy.access_to(Repository("reg.lab", "team/app")) is second
    assert policy.access_to(Repository("reg.lab", "other")).mode == "public"
    assert policy.tag_mode(Repository("reg.lab", "team/app")) == "pinned"
    assert policy.tag_mode(Repository("reg.lab", "other")) == "stale-if-error"
    assert Policy().tag_mode(Repository("reg.lab", "other")) == "origin"


def test_a_rule_has_a_short_form() -> None:
    assert AccessRule.parse("reg.lab:5000/team/*=passthrough") == AccessRule("reg.lab:5000", "team/*", "passthrough")
    assert AccessRule.parse("ghcr.io=deny") == AccessRule("ghcr.io", "*", "deny")
    assert TagRule.parse("*=pinned") == TagRule("*", "*", "pinned")


@pytest.mark.parametrize("text", ["", "reg.lab", "reg.lab=", "=deny", "reg.lab=pinned", "/x=deny"])
def test_a_short_form_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not REGISTRY"):
        AccessRule.parse(text)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"registry": "Reg.Lab"}, "no glob"),
        ({"registry": "reg.lab/team"}, "has a slash"),
        ({"repository": ""}, "no glob"),
        ({"repository": "a*b*c*d*e*"}, "no glob"),
        ({"mode": "public", "credentials": Path("x")}, "credentials go with"),
        ({"mode": "public", "share": True}, "share says"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        AccessRule(**fields)  # type: ignore[arg-type]


def test_many_stars_on_a_long_name_cost_no_second() -> None:
    rule = AccessRule("*", "*a*a*a*z", "deny")
    began = time.process_time()
    assert not rule.matches(Repository("reg.lab", "a" * 255))
    assert time.process_time() - began < 5


def test_a_caller_is_told_apart_without_the_secret() -> None:
    caller, same, other = (Caller.of(f"Bearer {SECRET}{end}") for end in ("", "", "x"))
    assert caller.key == same.key != other.key
    assert caller.authorization == f"Bearer {SECRET}"
    assert SECRET not in repr(caller) + caller.key


@pytest.mark.parametrize("header", [None, "", SECRET, f"Digest {SECRET}", f"Basic {SECRET}\r\nX: y", "Bearer "])
def test_a_header_that_no_registry_knows_is_nobodys(header: str | None) -> None:
    assert Caller.of(header) is NOBODY
