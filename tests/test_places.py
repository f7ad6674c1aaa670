"""Who may have a connection, and who hears that it is gone."""

import asyncio
import random
from typing import Any

import pytest

from wwwserve.serving.config import LimitsConfig
from wwwserve.serving.http.addresses import listen
from wwwserve.serving.http.asgi import WATCH, answer
from wwwserve.serving.http.places import Places, address_of
from wwwserve.serving.http.server import server_of


class Door:
    """A connection."""

    def __init__(self) -> None:
        self.closed = False

    def make_room(self) -> None:
        self.closed = True


def entered(places: Places[Door], address: str, count: int) -> list[Door]:
    made = [Door() for _ in range(count)]
    assert all([places.enter(each, address) for each in made])
    return made


def test_the_one_idle_longest_of_the_address_that_has_most_makes_room() -> None:
    places = Places[Door](8, 100, 0)
    quiet, loud = entered(places, "1.1.1.1", 2), entered(places, "2.2.2.2", 6)
    places.busy(loud[0])
    entered(places, "3.3.3.3", 1)
    assert [each.closed for each in loud] == [False, True, False, False, False, False]
    assert not any(each.closed for each in quiet)
    places.idle(loud[0])  # from now on, so it is the last to go
    entered(places, "3.3.3.3", 2)
    assert [each.closed for each in loud] == [False, True, True, True, False, False]


def test_an_address_has_so_many_and_where_all_are_busy_no_more() -> None:
    places = Places[Door](100, 3, 0)
    first = entered(places, "1.1.1.1", 3)
    entered(places, "1.1.1.1", 1)
    assert [each.closed for each in first] == [True, False, False]
    places = Places[Door](100, 3, 0)
    for each in entered(places, "1.1.1.1", 3):
        places.busy(each)
    assert not places.enter(Door(), "1.1.1.1") and places.is_crowded("1.1.1.1")
    assert places.enter(Door(), "1.1.1.2")


def test_places_for_peers_are_for_those_who_show_that_they_are() -> None:
    places = Places[Door](16, 100, 4)
    users = entered(places, "1.1.1.1", 12)
    for each in users:
        places.busy(each)
    strangers = entered(places, "2.2.2.2", 4)
    assert all(places.is_for_peers(each) for each in strangers)
    peer, other = entered(places, "3.3.3.3", 2)  # strangers make room
    assert [each.closed for each in strangers] == [True, True, False, False]
    assert places.keep_for(peer, "p") and not places.is_for_peers(peer)
    assert not places.keep_for(other, "p")  # which has its share already
    places.idle(peer)
    for _ in range(20):
        entered(places, "4.4.4.4", 1)
    assert places.is_for_peers(other) and not peer.closed and not any(each.closed for each in users)


def test_one_peer_takes_no_places_of_others_however_many_connections_it_has() -> None:
    """From as many addresses as it likes, with something under way on each."""
    places = Places[Door](400, 100, 64)
    for k in range(400):
        door = Door()
        if places.enter(door, f"1.1.1.{k}"):
            places.keep_for(door, "loud")
            places.busy(door)
    for k in range(60):  # fifteen others have their share, four each
        (door,) = entered(places, f"2.2.2.{k}", 1)
        assert places.keep_for(door, f"quiet {k // 4}") and not places.is_for_peers(door)
        places.busy(door)


def test_who_is_turned_away_again_and_again_leaves_time_for_others_to_hear_it() -> None:
    places = Places[Door](1, 1, 0)
    many = [Door() for _ in range(100)]
    assert [places.turn_away(door, "one", 64) for door in many] == [True] * 64 + [False] * 36
    others = [places.turn_away(Door(), f"address {k}", 64) for k in range(70)]
    assert others == [True] * 63 + [False] * 7  # until nobody has more than one
    assert [door.closed for door in many] == [True] * 63 + [False] * 37  # those who had most time first
    assert len(places.turned_away) == 64
    assert not places.turn_away(Door(), "one", 64)


def test_whatever_comes_the_bounds_hold() -> None:
    rng = random.Random(3)
    places, there = Places[Door](20, 6, 4), dict[Door, None]()
    for _ in range(5000):
        there = {each: None for each in there if not each.closed}
        act = rng.random()
        if act < 0.5 or not there:
            door = Door()
            if places.enter(door, f"10.0.0.{rng.randrange(8)}"):
                there[door] = None
        else:
            door = rng.choice(list(there))
            if act < 0.65:
                places.leave(door)
                del there[door]
            elif act < 0.8:
                places.busy(door)
            elif act < 0.95:
                places.idle(door)
            else:
                places.keep_for(door, f"p{rng.randrange(3)}")
        there = {each: None for each in there if not each.closed}
        assert len(places._address) == len(there) <= 20
        assert sum(places._count.values()) == len(there) and max(places._count.values(), default=0) <= 6
        assert {each for idle in places._idle.values() for each in idle} <= there.keys()
        assert len(places._kept) <= 4 and not places._kept.keys() - there.keys()
        others = there.keys() - places._kept.keys()
        assert sum(not places.is_for_peers(each) for each in others) <= 16


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("10.0.0.7", "10.0.0.7"), ("::ffff:10.0.0.7", "10.0.0.7"), ("2001:db8:1:2:3::9", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"), ("", ""),
    ],
)  # fmt: skip
def test_what_counts_as_one_address(host: str, address: str) -> None:
    assert address_of(host) == address


def test_each_of_two_requests_on_a_connection_hears_of_its_own_client_that_hangs_up() -> None:
    """The first is answered, and not yet over, when the second begins."""
    told, waits, over = list[str](), asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        scope[WATCH](lambda: told.append(path))
        if path == "/first":
            await answer(send, 200, b"{}")
            await waits.wait()
            scope[WATCH](None)
            over.set()
        else:
            waits.set()
            await over.wait()
            await asyncio.Event().wait()

    async def scene() -> None:
        with listen("127.0.0.1", 0) as listener:
            server = server_of(app, LimitsConfig())
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            _, writer = await asyncio.open_connection(*listener.getsockname())
            for path in ("/first", "/second"):
                writer.write(b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n" % path.encode())
            async with asyncio.timeout(10):
                await over.wait()
                writer.close()
                while not told:
                    await asyncio.sleep(0.01)
            server.should_exit = server.force_exit = True
            await serving

    asyncio.run(scene())
    assert told == ["/second"]
