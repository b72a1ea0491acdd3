# SPDX-License-Identifier: Apache-2.0
"""Whose word on a checksum counts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.types import Checksum, PeerId
from p2pdist.core.verify import CHECKSUM_BYTES, MAX_WRONG_WORDS, Basis, Vouchers, checksum_of
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


def test_two_peers_that_agree_are_enough_to_settle_it_for_all() -> None:
    vouchers = Vouchers()
    assert not vouchers.claim(0, WRONG, A)
    assert not vouchers.claim(0, RIGHT, B)
    assert vouchers.claim(0, RIGHT, C)
    assert vouchers.author(0, RIGHT, C) == B
    assert vouchers.settle(0, RIGHT, Basis.WITNESSES, B) == [(A, WRONG)]
    assert vouchers.expected(0, A) == RIGHT
    assert vouchers.basis(0) == (Basis.WITNESSES, B)


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
    assert vouchers.settle(0, RIGHT) == []


def test_a_better_word_replaces_a_settled_one() -> None:
    vouchers = Vouchers()
    vouchers.settle(0, WRONG, Basis.HOLDER, A)
    vouchers.settle(0, RIGHT)
    assert vouchers.expected(0, A) == RIGHT
    assert vouchers.basis(0) == (Basis.CERTAIN, None)


def test_chunks_that_proved_wrong_are_open_again_and_it_is_known_what_was_believed() -> None:
    vouchers = Vouchers()
    vouchers.settle(0, WRONG, Basis.HOLDER, A)
    vouchers.claim(1, WRONG, A)
    vouchers.settle(2, RIGHT)
    vouchers.forget([0, 1, 7])
    assert vouchers.expected(0, A) is None
    assert vouchers.expected(1, A) is None
    assert vouchers.settled == {2: RIGHT}
    assert vouchers.settled_bits == 0b100
    assert vouchers.basis(0) == (None, None)
    assert vouchers.overturned == {0: (WRONG, Basis.HOLDER, A)}


def test_the_author_of_a_word_is_who_said_it_first() -> None:
    vouchers = Vouchers()
    assert vouchers.author(0, RIGHT, C) == C
    vouchers.claim(0, WRONG, A)
    vouchers.claim(0, RIGHT, B)
    assert vouchers.author(0, RIGHT, C) == B


def test_a_wrong_word_is_news_once() -> None:
    vouchers = Vouchers()
    assert vouchers.news(0, WRONG)
    assert not vouchers.news(0, WRONG)
    assert vouchers.news(1, WRONG)
    vouchers.settle(2, WRONG, Basis.SCHEDULER)
    vouchers.forget([2])
    assert not vouchers.news(2, WRONG)
    assert sum(vouchers.news(3, checksum(number)) for number in range(200)) == MAX_WRONG_WORDS


def test_what_rests_on_a_peer_is_known_and_its_claims_can_be_withdrawn() -> None:
    vouchers = Vouchers()
    vouchers.settle(0, RIGHT, Basis.HOLDER, A)
    vouchers.settle(1, RIGHT, Basis.WITNESSES, B)
    vouchers.settle(2, RIGHT, Basis.SCHEDULER)
    vouchers.claim(3, RIGHT, A)
    assert vouchers.resting_on(A) == [0]
    assert vouchers.resting_on(B) == [1]
    assert vouchers.resting_on(C) == []
    vouchers.withdraw(A)
    assert vouchers.expected(3, A) is None
    assert vouchers.settled.keys() == {0, 1, 2}


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([RIGHT, WRONG]), st.sampled_from([A, B, C]))))
def test_claims_settle_only_what_two_different_peers_said_alike(claims: list[tuple[int, Checksum, PeerId]]) -> None:
    vouchers = Vouchers()
    last: dict[tuple[int, PeerId], Checksum] = {}
    for index, word, by in claims:
        if index in vouchers.settled:
            continue
        enough = vouchers.claim(index, word, by)
        last[index, by] = word
        agreeing = sum(said == word for (at, _), said in last.items() if at == index)
        assert enough == (agreeing >= 2)
        if enough:
            others = vouchers.settle(index, word, Basis.WITNESSES, vouchers.author(index, word, by))
            assert all(last[index, peer] == said != word for peer, said in others)


def test_words_agree_where_all_of_them_are_settled_and_the_same() -> None:
    vouchers = Vouchers()
    vouchers.settle(0, RIGHT)
    vouchers.settle(3, WRONG)
    assert vouchers.agree([3, 0], WRONG + RIGHT)
    assert not vouchers.agree([0, 3], WRONG + RIGHT)
    assert not vouchers.agree([0, 1], RIGHT + RIGHT)
