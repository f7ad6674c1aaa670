"""An evil world: nothing that must hold is violated in it, a seed is a history, what is undone of it shows."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from wwwserve.eval.live.world import command
from wwwserve.eval.live.world.adversaries import ADVERSARIES
from wwwserve.eval.live.world.faults import OF_PROCESSES
from wwwserve.eval.live.world.history import draw, play
from wwwserve.serving.http import messages
from wwwserve.serving.ledger import accounts, channel_ledger
from wwwserve.serving.ledger.accounts import Delivery, Payment
from wwwserve.serving.ledger.channel_ledger import ChannelLedger
from wwwserve.serving.ledger.reconcile import Reconciler

ROOT = Path(__file__).resolve().parent.parent
ALL = tuple(ADVERSARIES)
EARLIER = tuple(name for name in ALL if name != "withholder")


@pytest.mark.parametrize("adversaries", [(), *((name,) for name in ALL), ALL], ids=lambda names: "+".join(names)[:20])
def test_nothing_is_violated(adversaries: tuple[str, ...]) -> None:
    reports = [play(draw(seed, adversaries)) for seed in range(3)]
    assert [each.violations for each in reports] == [[], [], []]
    assert sum(each.ends["answered"] for each in reports) > 20
    assert sum(sum(each.faults.values()) for each in reports) > 10


@pytest.mark.parametrize(
    ("seed", "adversaries"),
    [
        (20087, EARLIER),  # a payer takes over a voucher of receipts of which it forgot the last
        (32026, EARLIER),  # an executor bills more than its text has, before the origin's engine has shown how much
        (32378, ()),  # a payee is told again what it forgot, though its payer starts anew meanwhile
    ],
)
def test_what_was_violated_once(seed: int, adversaries: tuple[str, ...]) -> None:
    drawn = draw(seed, adversaries)
    events = tuple(event for event in drawn.faults.events if event.kind not in OF_PROCESSES)
    assert play(drawn._replace(faults=drawn.faults._replace(events=events))).violations == []


def test_the_same_seed_is_the_same_history_in_every_process() -> None:
    program = (
        "from wwwserve.eval.live.world.history import draw, play\n"
        f"for seed in (5, 6): print(play(draw(seed, {ALL!r})).digest)"
    )
    other = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert other == [play(draw(seed, ALL)).digest for seed in (5, 6)]
    assert other[0] != other[1]


def test_an_honest_node_in_an_adversarys_place_changes_nothing_else() -> None:
    bad, good = draw(7, ALL), draw(7, ALL, honest=True)
    assert any(bad.adversaries) and not any(good.adversaries)
    assert bad._replace(adversaries=()) == good._replace(adversaries=())


def test_the_command_says_what_was_lost_to_whom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "world.json"
    assert command.main(["--histories", "4", "--adversaries", "free rider", "--json", str(file)]) == 0
    table = json.loads(file.read_text())
    assert table["histories"] == 4 and table["violated"] == 0 and table["adversaries"]["free rider"]["dealings"] > 0
    assert "free rider" in capsys.readouterr().out
    assert command.main(["--replay", "3"]) == 0
    assert f"digest {play(draw(3, ALL)).digest}" in capsys.readouterr().out
    assert command.main(["--adversaries", "nobody"]) == 2


# Protections that are undone, one by one: the adversary to whom it matters, and what is seen of it.


def unbounded_exposure(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(channel_ledger, "tolerated", lambda exposure, paid: 1 << 60)
    patch.setattr(channel_ledger, "available_credit", lambda payer, exposed, limit: int(payer[0]))


def unchecked_signatures(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(messages, "verify", lambda *_: None)


def escrow_that_need_not_cover(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(accounts, "most_of", lambda payment, terms: 1 << 31)


def receipts_of_open_requests(patch: pytest.MonkeyPatch) -> None:
    take = ChannelLedger.take

    def forget(self: ChannelLedger, peer: str, id: int, *more: object) -> None:
        take(self, peer, id, *more)  # type: ignore[arg-type]
        del self._running[peer, id]

    patch.setattr(ChannelLedger, "take", forget)
    patch.setattr(Delivery, "_wait_for_pay", _nothing)


def old_copies_that_go_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ChannelLedger, "is_reconciled", lambda self, peer: True)
    patch.setattr(Reconciler, "take_over", lambda self, peer, known: None)


def shortfalls_that_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ChannelLedger, "_compare", lambda *_: [])


def requests_of_an_earlier_run_that_stay_open(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ChannelLedger, "_on_known", lambda self, peer, known: self._reconciler.take_over(peer, known))


def escrow_that_is_never_freed(patch: pytest.MonkeyPatch) -> None:
    end = Payment.end
    patch.setattr(Payment, "end", lambda self, promise=None, came=None: end(self, promise, came) if came else 0)


async def _nothing(*_: object) -> None:
    return None


@pytest.mark.parametrize(
    ("seed", "undo", "adversaries", "seen"),
    [
        (101, unbounded_exposure, ("free rider",), "lost|in escrow than"),
        (131, unchecked_signatures, ("replayer",), "taken|conflict"),
        (105, escrow_that_need_not_cover, ("robber",), "lost"),
        (143, receipts_of_open_requests, ("free rider",), "lost"),
        (101, old_copies_that_go_on, (), "voucher|two vouchers|different"),
        (229, shortfalls_that_are_not_counted, ("free rider",), "lost"),
        (200, requests_of_an_earlier_run_that_stay_open, (), "in escrow"),
        (201, escrow_that_is_never_freed, (), "in escrow"),
    ],
)  # fmt: skip
def test_a_protection_that_is_undone_shows(
    seed: int,
    undo: Callable[[pytest.MonkeyPatch], None],
    adversaries: tuple[str, ...],
    seen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    undo(monkeypatch)
    report = play(draw(seed, adversaries))
    assert any(word in violation for violation in report.violations for word in seen.split("|")), report.violations
