# SPDX-License-Identifier: Apache-2.0
"""Neighbours, and drawing at random."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from scheduler.handout import Crowd, neighbours
from tests.strategies import peer

ME = peer(0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9))))
def test_a_crowd_is_a_set_whatever_comes_and_goes(changes: list[tuple[bool, int]]) -> None:
    crowd, expected = Crowd(), set()
    for comes, number in changes:
        if comes:
            crowd.add(peer(number))
            expected.add(peer(number))
        else:
            crowd.discard(peer(number))
            expected.discard(peer(number))
        assert sorted(crowd) == sorted(expected)
        assert len(crowd) == len(expected)
        assert all((peer(number) in crowd) == (peer(number) in expected) for number in range(10))


def test_a_sample_is_of_different_peers_each_equally_likely() -> None:
    crowd, rng, draws = Crowd(), Random(3), 4000
    for number in range(10):
        crowd.add(peer(number))
    counts = Counter[str]()
    for _ in range(draws):
        sample = crowd.sample(3, rng)
        assert len(set(sample)) == 3
        counts.update(sample)
    assert all(abs(count - draws * 0.3) < 4 * (draws * 0.3 * 0.7) ** 0.5 for count in counts.values())
    assert sorted(crowd.sample(10, rng)) == sorted(crowd.sample(99, rng)) == sorted(crowd)


def chosen(
    sites: dict[str, str],
    wanted: int,
    degrees: dict[str, int] | None = None,
    seed: int = 0,
    racks: dict[str, str] | None = None,
) -> list[str]:
    candidates = [other for other in sites if other != ME]
    known = dict.fromkeys(candidates, 0) | (degrees or {})
    places = {other: (site, (racks or {}).get(other, "")) for other, site in sites.items()}
    return list(neighbours(ME, candidates, known, places, wanted, Random(seed)))  # type: ignore[arg-type]


def test_where_there_are_fewer_than_wanted_all_are_chosen() -> None:
    sites = dict.fromkeys(map(peer, range(5)), "")
    assert sorted(chosen(sites, 10)) == [peer(number) for number in range(1, 5)]
    assert chosen(sites, 0) == []


def test_of_two_the_one_with_few_neighbours_comes_first_and_all_may_come() -> None:
    sites = dict.fromkeys(map(peer, range(9)), "")
    few = dict.fromkeys(map(peer, range(1, 9)), 5) | {peer(3): 1}
    picks = [chosen(sites, 4, few, seed) for seed in range(50)]
    assert all(peer(3) in picked for picked in picks)
    assert {other for picked in picks for other in picked} == set(few)


def test_most_come_from_the_newcomers_site_but_some_from_others() -> None:
    sites = {peer(number): "here" if number < 20 else "there" for number in range(40)}
    picked = chosen(sites, 10)
    assert [sites[other] for other in picked] == ["here"] * 8 + ["there"] * 2
    assert len(set(picked)) == 10


def test_a_site_that_is_too_small_is_filled_up_from_the_others_and_the_other_way_round() -> None:
    mostly_there = {peer(number): "here" if number < 3 else "there" for number in range(40)}
    assert Counter(mostly_there[other] for other in chosen(mostly_there, 10)) == {"here": 2, "there": 8}
    mostly_here = {peer(number): "here" if number < 39 else "there" for number in range(40)}
    assert Counter(mostly_here[other] for other in chosen(mostly_here, 10)) == {"here": 9, "there": 1}
    alone = {peer(number): "here" if number < 1 else "there" for number in range(40)}
    assert Counter(alone[other] for other in chosen(alone, 10)) == {"there": 10}


def test_of_the_newcomers_site_most_come_from_its_rack_and_racks_of_other_sites_do_not_count() -> None:
    sites = {peer(number): "here" if number < 40 else "there" for number in range(80)}
    racks = {peer(number): f"r{number % 2}" for number in range(80)}
    places = [(sites[other], racks[other]) for other in chosen(sites, 10, racks=racks)]
    assert Counter(places[:8]) == {("here", "r0"): 6, ("here", "r1"): 2}
    assert {site for site, _ in places[8:]} == {"there"}


def test_a_rack_is_most_of_the_neighbours_where_there_is_one_site_and_all_where_there_is_one_rack() -> None:
    sites = dict.fromkeys(map(peer, range(40)), "")
    racks = {peer(number): f"r{number % 2}" for number in range(40)}
    assert Counter(racks[other] for other in chosen(sites, 10, racks=racks)) == {"r0": 8, "r1": 2}
    assert len(chosen(sites, 10, racks=dict.fromkeys(racks, "r0"))) == 10
    small = {peer(number): "r0" if number < 3 else "r1" for number in range(40)}
    assert Counter(small[other] for other in chosen(sites, 10, racks=small)) == {"r0": 2, "r1": 8}


def grown(count: int, degree: int) -> dict[str, set[str]]:
    """The neighbours of each, after so many arrived one by one and dialled half the degree."""
    rng, graph = Random(5), dict[str, set[str]]()
    for number in range(count):
        newcomer, others = peer(number), list(graph)
        places = dict.fromkeys([*others, newcomer], ("", ""))
        degrees = {other: len(graph[other]) for other in others}
        picked = neighbours(newcomer, others, degrees, places, degree // 2, rng)  # type: ignore[arg-type]
        graph[newcomer] = set(picked)
        for other in picked:
            graph[other].add(newcomer)
    return graph


def test_a_graph_grown_one_by_one_is_nearly_regular() -> None:
    degree = 20
    degrees = [len(known) for known in grown(400, degree).values()]
    assert sum(degrees[:300]) / 300 > 0.95 * degree
    assert max(degrees) <= 1.5 * degree


def test_a_graph_grown_one_by_one_is_no_band_first_and_last_are_a_few_steps_apart() -> None:
    graph = grown(400, 20)
    reached, steps = {peer(0)}, 0
    while len(reached) < len(graph):
        reached, steps = reached.union(*(graph[other] for other in reached)), steps + 1
    assert steps <= 4
