# SPDX-License-Identifier: Apache-2.0
"""Whose word on a checksum counts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.verify import CHECKSUM_BYTES, Vouchers, checksum_of
from tests.strategies import checksum, peer

RIGHT, WRONG = checksum(1), checksum(2)
A, B, C = peer(1), peer(2), peer(3)


def test_a_checksum_is_the_xxh3_128_of_any_buffer() -> None:
    # The vector of the empty input in xxHash's own documentation.
    assert checksum_of(b"").hex() == "99aa06d3014798d86001c324468d497f"
    assert checksum_of(b"abc") == checksum_of(bytearray(b"abc")) == checksum_of(memoryview(b"abc"))
    assert len(checksum_of(b"abc")) == CHECKSUM_BYTES


def test_nothing_is_expected_of_what_nobody_spoke_of() -> None:
    assert Vouchers().expected(0, A) is None


def test_one_peers_word_is_expected_of_that_peer_only() -> None:
    vouchers = Vouchers()
    assert not vouchers.claim(0, RIGHT, A)
    assert vouchers.expected(0, A) == RIGHT
    assert vouchers.expected(0, B) is None
    assert vouchers.expected(1, A) is None


def test_two_peers_that_agree_settle_it_for_all() -> None:
    vouchers = Vouchers()
    assert not vouchers.claim(0, WRONG, A)
    assert not vouchers.claim(0, RIGHT, B)
    assert vouchers.claim(0, RIGHT, C)
    assert vouchers.settled == {0: RIGHT}
    assert vouchers.expected(0, A) == RIGHT


def test_a_peer_that_repeats_itself_is_still_one_witness() -> None:
    vouchers = Vouchers()
    assert not vouchers.claim(0, RIGHT, A)
    assert not vouchers.claim(0, RIGHT, A)
    assert not vouchers.settled


def test_a_peer_may_correct_itself() -> None:
    vouchers = Vouchers()
    vouchers.claim(0, WRONG, A)
    vouchers.claim(0, RIGHT, A)
    assert vouchers.expected(0, A) == RIGHT
    assert vouchers.claim(0, RIGHT, B)


def test_what_is_settled_stays_whatever_peers_claim() -> None:
    vouchers = Vouchers()
    vouchers.settle(0, RIGHT)
    assert not vouchers.claim(0, WRONG, A)
    assert not vouchers.claim(0, WRONG, B)
    assert vouchers.expected(0, A) == RIGHT


def test_a_better_word_replaces_a_settled_one() -> None:
    vouchers = Vouchers()
    vouchers.settle(0, WRONG)
    vouchers.settle(0, RIGHT)
    assert vouchers.expected(0, A) == RIGHT


def test_chunks_that_proved_wrong_are_open_again() -> None:
    vouchers = Vouchers()
    vouchers.settle(0, WRONG)
    vouchers.claim(1, WRONG, A)
    vouchers.settle(2, RIGHT)
    vouchers.forget([0, 1, 7])
    assert vouchers.expected(0, A) is None
    assert vouchers.expected(1, A) is None
    assert vouchers.settled == {2: RIGHT}


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([RIGHT, WRONG]), st.sampled_from([A, B, C]))))
def test_claims_settle_only_what_two_different_peers_said_alike(claims: list[tuple[int, bytes, str]]) -> None:
    vouchers = Vouchers()
    last: dict[tuple[int, str], bytes] = {}
    for index, word, by in claims:
        before = vouchers.settled.get(index)
        settled_now = vouchers.claim(index, word, by)  # type: ignore[arg-type]
        last[index, by] = word
        agreeing = sum(said == word for (at, _), said in last.items() if at == index)
        assert settled_now == (before is None and agreeing >= 2)
