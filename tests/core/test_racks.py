# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from random import Random

import pytest

from p2pdist.core import events as ev
from p2pdist.core.lease import holder_of
from p2pdist.core.racks import MOST_PATIENT, PATIENCE_S, WINDOW_PATIENCE_S, Importers, place_of
from p2pdist.core.wire import Decline, Grant, Room
from tests.script import CHUNKS, ME, B, Script, send, share, take
from tests.strategies import CHUNK, peer

HERE, THERE = "dc1/a", "dc1/b"
COUNT = 64
SIZE = COUNT * CHUNK
MATES = {ME, peer(2), peer(3)}
"""The agent and the two others of its rack; 4 and 5 are in another."""


def imported_by(member: object) -> list[int]:
    return [index for index in range(COUNT) if holder_of(B, index, MATES) == member]


def pulling(*, rack: str = HERE, mates: str = HERE, others: str = THERE, **settings: int) -> Script:
    """An agent that pulls B with two of its rack, all three without a chunk, while 4 has everything."""
    script = Script(scheduled=True, rack=rack, **settings)
    script.connect(2, 3, rack=mates)
    script.connect(4, rack=others)
    script.start(COUNT)
    script.says(2, share(size=SIZE))
    script.says(3, share(size=SIZE))
    script.tick(0.0)
    script.says(4, share(range(COUNT), size=SIZE, wants=False))
    return script


def grants(script: Script, number: int, most: int = COUNT) -> list[int]:
    """Grant to the agent until it declines; return the chunks that it takes."""
    taken: list[int] = []
    for grant in range(1, most + 2):
        out = script.says(number, Grant(len(taken) + 1000 * int(script.now) + grant))
        taken += [command.index for command in out if isinstance(command, ev.TakeChunk)]
        if any(isinstance(command, ev.Send) and isinstance(command.message, Decline) for command in out):
            break
    return taken


def granted(out: list[ev.Command]) -> set[int]:
    return {int(each.peer, 16) for each in out if isinstance(each, ev.Send) and isinstance(each.message, Grant)}


def test_a_rack_without_a_name_is_none_and_the_same_name_elsewhere_is_another() -> None:
    assert place_of("dc1", "") == ""
    assert len({place_of("dc1", "r1"), place_of("dc2", "r1"), place_of("", "r1"), place_of("dc1", "r2")}) == 4


def test_all_members_agree_on_one_importer_for_each_chunk_whoever_they_met_in_which_order() -> None:
    rng, here = Random(1), [peer(number) for number in range(6)]
    met, wanted = Importers(B, COUNT), set[object]()
    for _ in range(60):
        wanted ^= {rng.choice(here)}
        if wanted:
            fresh = Importers(B, COUNT)
            each = [met.chunks_of(member, set(wanted)) for member in here]  # type: ignore[arg-type]
            assert each == [fresh.chunks_of(member, set(wanted)) for member in here]  # type: ignore[arg-type]
            assert sum(bits.bit_count() for bits in each) == COUNT
            assert sum(each) == (1 << COUNT) - 1


def test_from_another_rack_an_agent_takes_what_it_is_to_import_and_nothing_else() -> None:
    assert sorted(grants(pulling(downloads=COUNT), 4)) == imported_by(ME)


def test_what_a_rack_mate_has_is_taken_inside_though_it_were_ours_to_import() -> None:
    script, mine = pulling(downloads=COUNT), imported_by(ME)
    script.says(2, share(mine[:5], size=SIZE))
    assert sorted(grants(script, 4)) == mine[5:]
    assert sorted(grants(script, 2)) == mine[:5]


@pytest.mark.parametrize(
    ("rack", "mates", "others"), [("", HERE, THERE), (HERE, HERE, ""), (HERE, HERE, HERE), (HERE, THERE, THERE)]
)
def test_everything_is_taken_where_a_rack_is_unknown_or_the_same_or_the_agent_is_alone_in_its(
    rack: str, mates: str, others: str
) -> None:
    assert len(grants(pulling(rack=rack, mates=mates, others=others, downloads=COUNT), 4)) == COUNT


def test_when_an_importer_goes_its_chunks_are_the_next_ones() -> None:
    script = pulling(downloads=COUNT)
    script.on(ev.PeerLost(peer=peer(2)))
    left = MATES - {peer(2)}
    assert sorted(grants(script, 4)) == [index for index in range(COUNT) if holder_of(B, index, left) == ME]


def test_a_member_that_has_all_or_wants_it_no_more_imports_nothing() -> None:
    script = pulling(downloads=COUNT)
    script.says(2, share(size=SIZE, wants=False))
    left = MATES - {peer(2)}
    assert sorted(grants(script, 4)) == [index for index in range(COUNT) if holder_of(B, index, left) == ME]


def patient(at: float, *, head: int | None = None) -> tuple[Script, list[ev.Command]]:
    """An agent that has had much on its way for as long, from 5, whose rack is not known."""
    script = Script(scheduled=True, rack=HERE, downloads=COUNT)
    script.connect(2, 3, rack=HERE)
    script.connect(4, rack=THERE)
    script.connect(5)
    script.start(COUNT)
    for number in (2, 3):
        script.says(number, share(size=SIZE))
    script.tick(0.0)
    script.says(4, share(range(COUNT // 2), size=SIZE, wants=False))
    script.says(5, share(range(COUNT // 2, COUNT), size=SIZE, wants=False))
    grants(script, 5)
    if head is not None:
        script.on(ev.HeadMoved(blob=B, reader=1, index=head))
    script.tick(0.1)
    return script, script.tick(0.1 + at)


def test_the_next_in_rank_imports_what_the_importer_has_not_for_long_then_anybody_does() -> None:
    first = [index for index in imported_by(ME) if index < COUNT // 2]
    script, out = patient(PATIENCE_S - 0.1)
    assert send(4, Room()) not in out
    assert sorted(grants(script, 4)) == first
    script, out = patient(PATIENCE_S + 0.1)
    assert send(4, Room()) in out
    second = [i for i in range(COUNT // 2) if ME in (holder_of(B, i, MATES), holder_of(B, i, MATES - {best(i)}))]
    assert sorted(grants(script, 4)) == second
    assert len(grants(patient(PATIENCE_S * MOST_PATIENT + 0.1)[0], 4)) == COUNT // 2


def best(index: int) -> object:
    return holder_of(B, index, MATES)


def test_for_a_reader_the_next_in_rank_waits_less() -> None:
    head = next(i for i in range(COUNT // 2) if best(i) != ME and holder_of(B, i, MATES - {best(i)}) == ME)
    assert head not in grants(patient(WINDOW_PATIENCE_S + 0.1)[0], 4)
    assert head in grants(patient(WINDOW_PATIENCE_S + 0.1, head=head)[0], 4)


def test_who_gets_next_to_nothing_for_long_takes_from_anybody_and_says_so() -> None:
    script = pulling(downloads=8)
    script.says(2, share(range(COUNT), size=SIZE))
    assert grants(script, 4) == []
    script.tick(0.1)
    assert send(4, Room()) in script.tick(PATIENCE_S + 0.2) + script.tick(PATIENCE_S + 0.3)
    assert len(grants(script, 4)) == 8


def seeding(**racks: str) -> Script:
    """An agent of HERE that has all, and knows 4, 5 and 6."""
    script = Script(scheduled=True, rack=HERE, upload_slots=8).seeding()
    for number in (4, 5, 6):
        script.connect(number, rack=racks.get(f"r{number}", THERE))
    return script


def test_a_sender_grants_to_importers_only_and_nothing_that_their_rack_has() -> None:
    script, there = seeding(r6=HERE), {peer(4), peer(5)}
    out = [*script.says(4, share()), *script.says(5, share())]
    mine = {number: sum(holder_of(B, i, there) == peer(number) for i in range(CHUNKS)) for number in (4, 5)}
    assert granted(out) == {number for number in (4, 5) if mine[number]} | {4}
    script = seeding(r6=HERE)
    script.says(4, share(range(CHUNKS), wants=False))
    assert not granted(script.says(5, share()))
    assert granted(script.says(6, share())) == {6}


def test_a_peer_that_asks_is_granted_to_whoever_is_to_import() -> None:
    script = seeding()
    script.says(4, share(range(CHUNKS), wants=False))
    assert not granted(script.says(5, share()))
    assert granted(script.says(5, Room())) == {5}


def test_a_chunk_far_from_its_rack_is_not_taken_twice() -> None:
    script = pulling(downloads=COUNT)
    (first, *_) = imported_by(ME)
    script.says(3, share([first], size=SIZE))
    assert take(3, 1, first) in script.says(3, Grant(1))
    assert first not in grants(script, 4)
