# SPDX-License-Identifier: Apache-2.0
"""In which word it is said how an identity is, and that every reason of a refusal has its name in the metrics."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import pytest

from p2pdist.core.identity import WARN_AT, Name
from p2pdist.identity import certificates, credentials
from p2pdist.identity.authority import Authority
from p2pdist.identity.credentials import Identity, no_certificate
from p2pdist.identity.refusals import REASONS, Refusals
from p2pdist.identity.standing import OFF, State, document, metrics, standing
from tests.identities import CLUSTER, make_authority

ROOT = Path(__file__).parent.parent.parent
ANN = f"{1:032x}"
STARTS, LIFE = int(time.time()), 3000


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("ours") / "ca")


@pytest.fixture
def identity(ours: Authority) -> Identity:
    """A certificate from STARTS on for LIFE seconds."""
    key = certificates.make_key()
    pem = ours.issue(key.public_key(), Name(CLUSTER, "agent", ANN), LIFE, STARTS)
    return Identity(credentials.load(ours.certificate, pem, certificates.key_pem(key)))


@pytest.mark.parametrize(
    ("after", "trouble", "state"),
    [
        (0, "", State.OK),
        (0.5, "", State.OK),
        (0.5, "scheduler a:5060 cannot be asked", State.NOT_RENEWED),
        (0.9, "", State.ENDING),
        (0.9, "scheduler a:5060 cannot be asked", State.ENDING),
        (1.1, "", State.EXPIRED),
        (1.1, "scheduler a:5060 cannot be asked", State.EXPIRED),
    ],
)
def test_the_state_follows_from_the_clock_and_the_last_attempt(
    identity: Identity, after: float, trouble: str, state: State
) -> None:
    now = standing(identity, trouble, STARTS + after * LIFE)
    assert now.state == state
    assert trouble in now.what
    assert f"agent/{ANN} of cluster {CLUSTER}" in now.what
    assert str(now).startswith(f"{state}: ")


def test_it_is_to_be_looked_at_from_two_thirds_of_the_certificates_life_on(identity: Identity) -> None:
    credential = identity.credential
    life = credential.not_after - credential.not_before
    assert credential.late_at == credential.not_before + WARN_AT * life
    assert standing(identity, "", credential.late_at).state == State.OK
    assert standing(identity, "", credential.late_at + 1).state == State.ENDING


def test_who_is_revoked_hears_that_before_all_else(identity: Identity) -> None:
    identity.revocations = identity.revocations.with_name(f"agent/{ANN}")
    assert standing(identity, "no scheduler", STARTS + 2 * LIFE).state == State.REVOKED


def test_without_an_identity_that_is_said_and_no_end_is_shown() -> None:
    assert standing(None, "", 0.0) == OFF
    assert document(None, OFF, Refusals())["ends"] is None
    samples = [sample for family in metrics(None, Refusals()) for sample in family.samples]
    assert {sample.name for sample in samples} == {"p2pdist_connections_refused_total"}


async def test_each_reason_is_counted_under_its_name_from_the_start(identity: Identity) -> None:
    refusals = Refusals()
    refusals.note("peers", "192.0.2.1", no_certificate())
    samples = [sample for family in metrics(identity, refusals) for sample in family.samples]
    counted = {sample.labels["reason"]: sample.value for sample in samples if "reason" in sample.labels}
    assert counted == {**dict.fromkeys(REASONS, 0), "no-certificate": 1}
    shown = {sample.name: sample.value for sample in samples if not sample.labels}
    assert shown["p2pdist_identity_ends_timestamp_seconds"] == identity.credential.not_after


def test_no_reason_is_given_that_the_metrics_do_not_know() -> None:
    said = set(credentials._VERIFY.values())
    for file in (file for package in ("p2pdist", "scheduler") for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "IdentityRefused":
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    said.add(first.value)
    # One more is made where OpenSSL's number is not in the table.
    assert said | {"certificate"} == set(REASONS)


def test_the_page_lists_every_reason_and_every_state() -> None:
    page = (ROOT / "docs/identity.md").read_text()
    assert [reason for reason in REASONS if f"`{reason}`" not in page] == []
    assert [state for state in State if f"`{state}`" not in page] == []
