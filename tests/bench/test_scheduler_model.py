# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from random import Random

import pytest

from bench.scheduler_model import ORIGIN_LATENCY_S, Image, Origin, Plan, arrival_s, longest_s, peer_id


class Never(Random):
    """Draws nothing that is rare."""

    def random(self) -> float:
        return 0.999


def plan(**changes: float) -> Plan:
    sizes: dict[str, float] = {"agents": 10, "image_bytes": 80 << 20, "layers": 4, "spread_s": 9.0}
    rates: dict[str, float] = {"origin_mbit": 200.0, "link_mbit": 1000.0, "seed": 1}
    return Plan(**{**sizes, **rates, **changes})  # type: ignore[arg-type]


def test_an_image_is_a_manifest_a_config_and_equal_layers_of_different_names() -> None:
    image = Image(plan())
    assert len({blob.digest for blob in image.blobs.values()}) == 6
    assert [blob.chunks.size_bytes for blob in image.contents[1:]] == [20 << 20] * 4
    assert set(image.blobs) == {image.manifest.digest, *(blob.digest for blob in image.contents)}
    assert set(Image(plan(seed=2)).blobs).isdisjoint(image.blobs), "each run has blobs of its own"


def test_a_blob_can_be_leased_from_its_first_join_until_all_its_chunks_are() -> None:
    blob = Image(plan()).manifest
    assert not blob.leasable
    blob.joined = True
    assert blob.leasable
    blob.leased.add(0)
    assert not blob.leasable
    assert not blob.complete
    blob.done.add(0)
    assert blob.complete


def test_the_origin_serves_one_after_another_at_its_rate() -> None:
    origin = Origin(8, Never())
    assert origin.fetch(1_000_000, now=10) == pytest.approx(11 + ORIGIN_LATENCY_S)
    assert origin.fetch(500_000, now=10) == pytest.approx(11.5 + ORIGIN_LATENCY_S), "behind the first"
    assert origin.fetch(1_000_000, now=20) == pytest.approx(21 + ORIGIN_LATENCY_S), "idle meanwhile"


def test_a_link_brings_a_blob_after_what_is_pulled_before_it() -> None:
    image = Image(plan())
    first, second = image.contents[1:3]
    alone, behind = arrival_s(plan(), second, []), arrival_s(plan(), second, [first])
    assert behind - alone == pytest.approx((20 << 20) * 8 / 1e9)


def test_the_longest_run_is_bound_by_the_slower_of_origin_and_links() -> None:
    assert longest_s(plan()) == pytest.approx(9 + (80 << 20) * 8 / 200e6)
    assert longest_s(plan(link_mbit=20)) == pytest.approx(9 + (80 << 20) * 8 / 20e6)


def test_agents_have_ids_of_their_own() -> None:
    assert len({peer_id(number) for number in range(1000)}) == 1000
