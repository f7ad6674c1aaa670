"""An evil world: nothing that must hold is violated in it, a seed is a history, what is undone of it shows."""

import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from wwwserve.agents.protocol import MICRO, QUOTED
from wwwserve.eval.live.world import command
from wwwserve.eval.live.world.faults import OF_PROCESSES, Event
from wwwserve.eval.live.world.history import Asked, Drawn, draw, play
from wwwserve.eval.live.world.roster import ADVERSARIES
from wwwserve.serving.duel import attestor, judge_pool
from wwwserve.serving.http import messages
from wwwserve.serving.http.sse import AnswerMeter
from wwwserve.serving.ledger import accounts, channel_ledger, stakes, verdicts
from wwwserve.serving.ledger.accounts import Delivery, Payment
from wwwserve.serving.ledger.channel_ledger import ChannelLedger
from wwwserve.serving.ledger.reconcile import Reconciler
from wwwserve.serving.ledger.token_rate import TokenRate

pytestmark = pytest.mark.usefixtures("alone")

ROOT = Path(__file__).resolve().parent.parent
ALL = tuple(ADVERSARIES)
NEW = ("withholder", "freeloader", "forger", "judge buyer", "crowd")
EARLIER = tuple(name for name in ALL if name not in (*NEW, "leaver"))


def of_machines(drawn: Drawn) -> Drawn:
    """Without the faults of processes, and with channels that stay as they were opened."""
    events = tuple(event for event in drawn.faults.events if event.kind not in OF_PROCESSES)
    agreed = drawn.agreed._replace(refills=(), apart=())
    return drawn._replace(agreed=agreed, faults=drawn.faults._replace(events=events))


def busy(drawn: Drawn) -> Drawn:
    """Without faults; each has more to do than it can, and users let answers be four times as long as they are."""
    asked = [each._replace(most=4 * each.output, stream=True, leaves_s=None) for each in drawn.asked]
    agreed = drawn.agreed._replace(payment=QUOTED, exposure=MICRO // 10, grant=5 * MICRO, refills=(), apart=())
    faults = drawn.faults._replace(events=(), loss=0.0)
    return drawn._replace(agreed=agreed, places=[1] * len(drawn.places), asked=asked, faults=faults)


def calm(drawn: Drawn) -> Drawn:
    """Without faults."""
    faults = drawn.faults._replace(
        events=(), loss=0.0, late=0.0, duplication=0.0, far_s=0.005, jitter_s=0.0, end_s=20.0
    )  # fmt: skip
    return drawn._replace(faults=faults)


def trading(drawn: Drawn) -> Drawn:
    """Without faults; all nodes hand over most of what they are asked, and can pay for it."""
    asked = [Asked(k, k % len(drawn.places), 4.0 + 0.3 * k, 20, 20, 20, True, None) for k in range(40)]
    agreed = drawn.agreed._replace(payment=QUOTED, exposure=MICRO, grant=20 * MICRO, refills=(), apart=())
    count = len(drawn.places)
    return calm(drawn)._replace(asked=asked, agreed=agreed, places=[4] * count, policies=["random"] * count)


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


@pytest.mark.parametrize(
    "seed",
    [
        7100101,  # a prompt is longer than was said, and its payer does not settle
        7200213,  # a prompt is shorter than was said
        7100899,  # a clock is set back, and an advert of the run before comes late
        7200122,
        7300877,  # a node that forgot a voucher closes alone before its peer tells it, and states too little
        7701104,  # two of whom one wants no channel have never opened one
        7500204,  # a disk is put back to two copies, of which the later has a voucher that never came
        8100128,  # one that lost a voucher closes alone, with another receipt in its place
    ],
)
def test_what_was_violated_with_all_adversaries(seed: int) -> None:
    assert play(draw(seed, (*EARLIER, *NEW, "leaver"))).violations == []


def test_a_history_ends_once_honest_nodes_have_heard_each_other_again() -> None:
    """One that started anew knows what a peer has at stake once the peer hears it."""
    assert play(draw(8410084, (*EARLIER, *NEW, "leaver"), duels=0.3)).violations == []


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


def test_what_a_node_earns_is_what_it_is_paid_and_its_users_get_less_its_work() -> None:
    drawn = trading(draw(311, (), duels=0.0))
    report = play(drawn._replace(adversaries=("",) * len(drawn.places)))  # that is, all of them are looked at
    assert report.violations == [] and report.ends == {"answered": 40}
    assert sum(each.credit for each in report.earnings) == 0 < sum(abs(each.credit) for each in report.earnings)
    assert sum(each.value for each in report.earnings) == pytest.approx(40 * (20 + 20 / 4) * MICRO / 1000, abs=9)
    assert all(each.work > 0 and each.staked == 0 for each in report.earnings)


def test_who_sells_what_no_model_wrote_loses_its_stake_by_duels() -> None:
    for adversaries in (("judge buyer",), ("forger",)):
        report = play(trading(draw(314, adversaries, duels=1.0)))
        assert report.violations == [] and report.duels > 3
        assert [each.staked for each in report.earnings] == [5 * MICRO] * 3
        assert all(each.total < 0 for each in report.earnings)


@pytest.mark.parametrize("adversaries", [(), NEW], ids=["honest", "all"])
def test_nothing_is_violated_by_duels_among_faults(adversaries: tuple[str, ...]) -> None:
    assert [play(draw(seed, adversaries, duels=0.7)).violations for seed in (0, 7, 10)] == [[], [], []]


def test_an_acknowledgement_that_a_peer_forgot_before_it_came_counts_for_nothing() -> None:
    assert play(draw(71038, ("forger",))).violations == []


def test_what_was_staked_is_known_to_all_though_its_node_went_back_to_an_old_copy() -> None:
    adversaries = ("judge buyer", "forger", "crowd", "equivocator")  # none of whom is in it
    assert play(draw(214, adversaries, duels=0.7)).violations == []


def test_the_command_says_what_was_lost_to_whom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "world.json"
    assert command.main(["--histories", "4", "--adversaries", "free rider", "--json", str(file)]) == 0
    table = json.loads(file.read_text())
    assert table["histories"] == 4 and table["violated"] == 0 and table["adversaries"]["free rider"]["dealings"] > 0
    assert "free rider" in capsys.readouterr().out
    assert command.main(["--histories", "2", "--alone", "--adversaries", "forger", "sybil", "--json", str(file)]) == 0
    table = json.loads(file.read_text())
    assert table["histories"] == 6
    for row in (table["adversaries"]["forger"], table["adversaries"]["sybil"]):
        assert row["better_off"] == pytest.approx(row["earned"] - row["honest_earned"], abs=2e-6)
        assert row["better_off_ci95"] > 0
    assert "better" in capsys.readouterr().out
    assert command.main(["--alone", "--replay", "3"]) == 2
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


def prompts_that_are_paid_as_was_said(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ChannelLedger, "_beyond", lambda *_: 0)


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
        (109, of_machines, unchecked_signatures, ("replayer",), "taken|conflict"),
        (105, of_machines, escrow_that_need_not_cover, ("robber",), "lost"),
        (143, of_machines, receipts_of_open_requests, ("free rider",), "lost"),
        (101, of_machines, old_copies_that_go_on, (), "voucher|two vouchers|different"),
        (229, of_machines, shortfalls_that_are_not_counted, ("free rider",), "lost"),
        (166, of_machines, prompts_that_are_paid_as_was_said, ("free rider",), "of which its books know"),
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


# The same of duels.


def votes_that_nobody_checks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(verdicts, "verify_votes", lambda case, votes: None)


def verdicts_that_nobody_checks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(channel_ledger, "verify", lambda stated: None)


def judges_that_forget_what_they_judged(patch: pytest.MonkeyPatch) -> None:
    class Forgetful(OrderedDict[str, object]):
        def get(self, key: str, default: object = None) -> object:
            return default

        def __contains__(self, key: object) -> bool:
            return False

    patch.setattr(judge_pool, "OrderedDict", Forgetful)


def executors_that_sign_an_answer_again(patch: pytest.MonkeyPatch) -> None:
    class Keeping(OrderedDict[str, object]):
        def __delitem__(self, key: str) -> None:
            pass

    patch.setattr(attestor, "OrderedDict", Keeping)


def stake_that_is_burnt(patch: pytest.MonkeyPatch) -> None:
    move = stakes.move_stakes

    def burn(accounts: NDArray[np.int64], *more: object) -> None:
        move(accounts, *more)  # type: ignore[arg-type]
        accounts[0] = 0

    patch.setattr(stakes, "move_stakes", burn)


def verdicts_in_the_order_they_come(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stakes.Stakes, "_fold", lambda self: None)


def test_peers_that_do_not_tell_one_again_that_starts_anew_show(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = draw(3, (), duels=0.7)
    assert play(drawn).violations == []
    monkeypatch.setattr(accounts.Accounts, "gone", lambda self, peer: None)
    assert any("has at stake" in violation for violation in play(drawn).violations)


@pytest.mark.parametrize(
    ("undo", "seen"),
    [
        (votes_that_nobody_checks, "lost a duel"), (verdicts_that_nobody_checks, "lost a duel"),
        (judges_that_forget_what_they_judged, "signed"), (executors_that_sign_an_answer_again, "signed"),
        (stake_that_is_burnt, "conserved"), (verdicts_in_the_order_they_come, "another order"),
    ],
)  # fmt: skip
def test_a_protection_of_duels_that_is_undone_shows(
    undo: Callable[[pytest.MonkeyPatch], None], seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo(monkeypatch)
    report = play(trading(draw(314, ("judge buyer",), duels=1.0)))
    assert any(seen in violation for violation in report.violations), report.violations
