"""Who abuses closings in an evil world gets no more by them, and a protection that is undone shows."""

from collections.abc import Callable

import pytest

from wwwserve.eval.live.world.history import draw, play
from wwwserve.serving.ledger import closing
from wwwserve.serving.ledger.channel import Books
from wwwserve.serving.ledger.channel_ledger import ChannelLedger
from wwwserve.serving.ledger.closing import Closer
from wwwserve.serving.ledger.entries import Closed

pytestmark = pytest.mark.usefixtures("alone")


def what_is_owed_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    closed = Books._closed

    def forget(self: Books, event: Closed) -> None:
        channel = self.channel(event.peer)
        short = channel.short
        closed(self, event)
        channel.short, channel.unpaid = short, 0

    patch.setattr(Books, "_closed", forget)


def channels_close_while_something_is_under_way(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ChannelLedger, "_is_busy", lambda self, peer: False)


def whatever_a_peer_states_is_signed(patch: pytest.MonkeyPatch) -> None:
    received = Closer.received

    def sign_all(self: Closer, peer: str, message: closing.Close, *more: bool) -> object:
        ended, channel = message.ended, self._ledger.books.channel(peer)
        if ended.closing.number == channel.closings + 1 and not ended.closing.open:
            return self._agree(peer, ended.closing, ended)
        return received(self, peer, message, *more)

    patch.setattr(Closer, "received", sign_all)


def channels_close_and_open_without_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(closing, "MOST_CLOSINGS", 1 << 30)


@pytest.mark.parametrize(
    ("seed", "undo", "seen"),
    [
        (800001, what_is_owed_is_forgotten, "its books know"),
        (800004, channels_close_while_something_is_under_way, "its books know"),
        (800007, whatever_a_peer_states_is_signed, "of which it signed"),
        (800008, channels_close_and_open_without_end, "times in one run"),
    ],
)
def test_a_protection_of_closings_that_is_undone_shows(
    seed: int, undo: Callable[[pytest.MonkeyPatch], None], seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = draw(seed, ("leaver",))
    assert play(drawn).violations == []
    undo(monkeypatch)
    report = play(drawn)
    assert any(seen in violation for violation in report.violations), report.violations


def test_a_leaver_closes_channels_and_opens_them_again_and_gets_no_more_than_the_exposure() -> None:
    report = play(draw(800008, ("leaver",)))
    dealings = [each for each in report.dealings if each.adversary == "leaver"]
    assert sum(each.closings for each in dealings) > 20
    assert all(each.lost <= each.runs * each.exposure + each.tolerated for each in dealings)
