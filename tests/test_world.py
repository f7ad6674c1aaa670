"""An evil world: nothing that must hold is violated in it, a seed is a history, what is undone of it shows."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from wwwserve.agents.protocol import MICRO, QUOTED
from wwwserve.eval.live.world import command
from wwwserve.eval.live.world.adversaries import ADVERSARIES
from wwwserve.eval.live.world.faults import OF_PROCESSES, Event
from wwwserve.eval.live.world.history import Drawn, draw, play
from wwwserve.serving.http import messages
from wwwserve.serving.http.sse import AnswerMeter
from wwwserve.serving.ledger import accounts, channel_ledger
from wwwserve.serving.ledger.accounts import Delivery, Payment, TokenRate
from wwwserve.serving.ledger.channel_ledger import ChannelLedger
from wwwserve.serving.ledger.reconcile import Reconciler

ROOT = Path(__file__).resolve().parent.parent
ALL = tuple(ADVERSARIES)
EARLIER = tuple(name for name in ALL if name != "withholder")


def of_machines(drawn: Drawn) -> Drawn:
    """Without the faults of processes."""
    events = tuple(event for event in drawn.faults.events if event.kind not in OF_PROCESSES)
    return drawn._replace(faults=drawn.faults._replace(events=events))


def busy(drawn: Drawn) -> Drawn:
    """Without faults; each has more to do than it can, and users let answers be four times as long as they are."""
    asked = [each._replace(most=4 * each.output, stream=True, leaves_s=None) for each in drawn.asked]
    agreed = drawn.agreed._replace(payment=QUOTED, exposure=MICRO // 10, grant=5 * MICRO)
    faults = drawn.faults._replace(events=(), loss=0.0)
    return drawn._replace(agreed=agreed, places=[1] * len(drawn.places), asked=asked, faults=faults)


def dying(drawn: Drawn) -> Drawn:
    """Disks are slow, and each honest node dies again and again as it tells a ledger something."""
    honest = len(drawn.places) - len(drawn.adversaries)
    events = tuple(Event("crash telling", 2.0 + k, 0.3, k % honest, 0.0) for k in range(20))
    return drawn._replace(faults=drawn.faults._replace(write_s=0.3, events=events, end_s=30.0))


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
    assert play(of_machines(draw(seed, adversaries))).violations == []


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


def tokens_that_are_billed_and_not_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AnswerMeter, "tokens", property(lambda self: self.usage.output if self.usage else self._pieces))
    patch.setattr(TokenRate, "billed", lambda *_: 0)


def messages_before_the_disk_has_them(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ChannelLedger, "durable", _nothing)


async def _nothing(*_: object) -> None:
    return None


@pytest.mark.parametrize(
    ("seed", "world", "undo", "adversaries", "seen"),
    [
        (101, of_machines, unbounded_exposure, ("free rider",), "lost|in escrow than"),
        (132, of_machines, unchecked_signatures, ("replayer",), "taken|conflict"),
        (105, of_machines, escrow_that_need_not_cover, ("robber",), "lost"),
        (143, of_machines, receipts_of_open_requests, ("free rider",), "lost"),
        (101, of_machines, old_copies_that_go_on, (), "voucher|two vouchers|different"),
        (229, of_machines, shortfalls_that_are_not_counted, ("free rider",), "lost"),
        (200, of_machines, requests_of_an_earlier_run_that_stay_open, (), "in escrow"),
        (201, of_machines, escrow_that_is_never_freed, (), "in escrow"),
        (111, busy, tokens_that_are_billed_and_not_counted, ("inflater",), "lost"),
        (110, dying, messages_before_the_disk_has_them, ("withholder",), "evidence"),
    ],
)  # fmt: skip
def test_a_protection_that_is_undone_shows(
    seed: int,
    world: Callable[[Drawn], Drawn],
    undo: Callable[[pytest.MonkeyPatch], None],
    adversaries: tuple[str, ...],
    seen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = world(draw(seed, adversaries))
    assert play(drawn).violations == []
    undo(monkeypatch)
    report = play(drawn)
    assert any(word in violation for violation in report.violations for word in seen.split("|")), report.violations
