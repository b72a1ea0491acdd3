# SPDX-License-Identifier: Apache-2.0
"""Rights do not cross subjects, repositories or time; what a granted manifest names is granted with it."""

from __future__ import annotations

from p2pdist.core import grants as module
from p2pdist.core.grants import Grants
from p2pdist.core.types import Repository
from tests.strategies import digest

APP, OTHER = Repository("reg.lab", "team/app"), Repository("reg.lab", "other")
INDEX, MANIFEST, BLOB, SECOND = digest(1), digest(2), digest(3), digest(4)


def named() -> Grants:
    grants = Grants()
    grants.name(APP, INDEX, [MANIFEST])
    grants.name(APP, MANIFEST, [BLOB])
    return grants


def test_a_grant_ends_by_itself() -> None:
    grants = Grants()
    grants.grant("a", APP, MANIFEST, 10.0)
    assert grants.itself("a", APP, MANIFEST, 9.9)
    assert not grants.itself("a", APP, MANIFEST, 10.0)


def test_what_a_granted_manifest_leads_to_is_granted_with_it() -> None:
    grants = named()
    grants.grant("a", APP, INDEX, 10.0)
    assert grants.holds("a", APP, BLOB, 0.0)
    assert grants.holds("a", APP, MANIFEST, 0.0)
    assert not grants.itself("a", APP, MANIFEST, 0.0)
    assert not grants.holds("a", APP, BLOB, 10.0)


def test_rights_are_of_one_subject_in_one_repository() -> None:
    grants = named()
    grants.grant("a", APP, INDEX, 10.0)
    assert not grants.holds("b", APP, BLOB, 0.0)
    assert not grants.holds("", APP, BLOB, 0.0)
    assert not grants.holds("a", OTHER, BLOB, 0.0)
    grants.grant("a", OTHER, INDEX, 10.0)
    assert not grants.holds("a", OTHER, BLOB, 0.0), "nobody said in that repository what the index names"


def test_a_granted_blob_opens_nothing_else() -> None:
    grants = named()
    grants.grant("a", APP, BLOB, 10.0)
    assert grants.holds("a", APP, BLOB, 0.0)
    assert not grants.holds("a", APP, MANIFEST, 0.0)


def test_what_is_revoked_is_gone_for_this_subject_and_repository_alone() -> None:
    grants = named()
    for subject in "ab":
        for repository in (APP, OTHER):
            grants.grant(subject, repository, MANIFEST, 10.0)
    grants.revoke("a", APP)
    assert not grants.holds("a", APP, BLOB, 0.0)
    assert grants.holds("b", APP, BLOB, 0.0)
    assert grants.itself("a", OTHER, MANIFEST, 0.0)
    grants.clear()
    assert not grants.holds("b", APP, BLOB, 0.0)
    assert grants.parents(APP, BLOB) == (MANIFEST,)


def test_a_blob_belongs_to_the_latest_manifests_that_name_it() -> None:
    grants = named()
    grants.name(APP, SECOND, [BLOB])
    grants.name(APP, MANIFEST, [BLOB])
    assert grants.parents(APP, BLOB) == (MANIFEST, SECOND)
    for number in range(100, 200):
        grants.name(APP, digest(number), [BLOB])
    assert grants.parents(APP, BLOB)[0] == digest(199)
    assert len(grants.parents(APP, BLOB)) == module._MAX_PARENTS


def test_manifests_that_name_each_other_do_not_hang() -> None:
    grants = Grants()
    grants.name(APP, INDEX, [MANIFEST])
    grants.name(APP, MANIFEST, [INDEX])
    assert not grants.holds("a", APP, INDEX, 0.0)


def test_both_tables_are_bounded() -> None:
    grants = Grants()
    for number in range(module.MAX_GRANTS + 5):
        grants.grant(str(number), APP, MANIFEST, 10.0)
    assert not grants.itself("4", APP, MANIFEST, 0.0)
    assert grants.itself("5", APP, MANIFEST, 0.0)
    grants.name(APP, MANIFEST, [digest(number) for number in range(module.MAX_NAMED + 5)])
    assert len(grants._parents) == module.MAX_NAMED
