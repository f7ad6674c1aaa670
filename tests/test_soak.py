"""Real nodes under faults, one of them malicious: a short run of `eval.live.soak`, and what its checks notice."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from ledger_sides import BODY, PROMISE, A, B, Sides, came

from wwwserve.eval.live.soak import command as soak
from wwwserve.eval.live.soak import witness
from wwwserve.eval.live.soak.checks import MOST_MB, Checks
from wwwserve.eval.live.soak.malice import Altered
from wwwserve.eval.live.soak.users import Users
from wwwserve.serving.http.reply import Reply
from wwwserve.serving.ledger.statements import PART


def test_all_is_accounted_for_after_kills_and_other_faults_with_a_malicious_node(tmp_path: Path) -> None:
    out, kept = tmp_path / "soak.json", tmp_path / "kept"
    given = ["--kills", "6", "--seed", "1", "--rate", "6", "--json", str(out), "--keep", str(kept)]
    assert soak.main(given) == 0, out.read_text()
    found = json.loads(out.read_text())
    assert found["kills"] == 6 and 0 < found["journals_verified_after_kills"] <= 6
    assert found["channels_that_agree"] == 6  # of four honest nodes
    assert set(found["faults"]) == {"freeze", "full disk", "clock off", "partition"}
    assert found["faults"]["full disk"]["answered_meanwhile"] > 0
    assert found["ended"]["answered"] > 20 and found["receipts"] > 10 and found["paid_credits"] > 0
    assert found["later_turns"] > 10 and found["duels"] > 0 and sum(found["strategies"].values()) >= 1
    assert found["billed_twice"] == 0 and found["problems"] == []
    assert len(found["to_the_malicious"]) == 4 and (kept / "node1.seen").stat().st_size > 0
    assert "https://" in (kept / "node1.yaml").read_text()


def test_a_bad_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--kills", "0"]) == 2
    assert "--kills is 0, expected at least 1" in capsys.readouterr().err


# What is checked in the end.


def checked(sides: Sides, folder: Path, b_honest: bool = True, **b: Any) -> list[str]:
    """Problems of a run in which A was an honest node and B one with these attributes."""
    for journal in sides.journals.values():
        journal.close()
    genesis = folder / "genesis.yaml"
    genesis.write_text(yaml.safe_dump({"accounts": {each.name: {"credit": 100.0, "stake": 4.0} for each in (A, B)}}))
    nodes = []
    for who, more in ((A, {}), (B, {"honest": b_honest, **b})):
        name = "a" if who is A else "b"
        (folder / f"{name}.log").touch()
        node = {
            "name": name, "key": who.name, "honest": True, "ledger": sides.file(who), "lives": 1, "most_mb": 200.0,
            "seen": folder / f"{name}.seen", "programs": SimpleNamespace(log=lambda name: folder / f"{name}.log"),
        }  # fmt: skip
        nodes.append(SimpleNamespace(**node | more))
    checks = Checks(cast(Any, nodes), 1.0, genesis)
    checks.all()
    return checks.problems


def traded(folder: Path, *, bodies: int = 1, pays: Any = None) -> Sides:
    """Requests of A that B answered with 1000 tokens each."""
    sides = Sides("sqlite", folder)

    async def trade() -> None:
        await sides.exchange()
        for _ in range(bodies):
            id = sides.ask()
            sides.b.delivered(A.name, id, came(1000), 1_000_000)
            sides.a.settle(B.name, id, PROMISE, pays or came(1000), 1000)
            await sides.exchange()

    asyncio.run(trade())
    return sides


def test_a_run_in_which_all_is_right_has_no_problems(tmp_path: Path) -> None:
    assert checked(traded(tmp_path), tmp_path) == []


def test_a_request_that_is_paid_for_twice_is_a_problem_in_a_duel_as_well(tmp_path: Path) -> None:
    sides = traded(tmp_path, bodies=2)
    (tmp_path / "a.seen").write_text(json.dumps(["duel", BODY, 0]) + "\n")
    assert checked(sides, tmp_path) == [f"a request was paid for twice: {BODY} by b"]


def test_evidence_that_no_fault_explains_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    assert checked(traded(tmp_path / "x", pays=came(500, PART)), tmp_path / "x") == []  # who died did not see the end
    [problem] = checked(traded(tmp_path, pays=came(500)), tmp_path)
    assert problem.startswith("b has evidence against a: short")


def test_a_loss_beyond_the_exposure_and_a_fiftieth_is_a_problem(tmp_path: Path) -> None:
    sides = traded(tmp_path, bodies=1)  # a credit is paid, and less came of B than that and its exposure
    (tmp_path / "a.seen").write_text(json.dumps(["came", B.name, -20_001]) + "\n" + '["came", "cut')
    assert checked(sides, tmp_path, b_honest=False) == ["a lost 1020001 as origin in 1 runs"]
    (tmp_path / "a.seen").write_text(json.dumps(["came", B.name, -20_000]) + "\n")
    assert checked(sides, tmp_path, b_honest=False) == []


def test_memory_and_stack_traces_are_problems(tmp_path: Path) -> None:
    sides = traded(tmp_path)
    (tmp_path / "b.log").write_text('{"at": 1, "message": "a round failed", "exception": "..."}\n')
    one, other = checked(sides, tmp_path, most_mb=MOST_MB + 1)
    assert one == "b had 401 MB" and other.startswith("the log of b has a stack trace: ")


# What users and witnesses make of bytes.

STREAM = b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("status", "stream", "body", "outcome"),
    [
        (200, False, b'{"usage": {}}', "answered"),
        (200, False, b'{"usage": {}}{"usage": {}}', "not one end"),
        (200, False, b"", "not one end"),
        (200, True, STREAM % b"the old" + DONE, "answered"),
        (200, True, STREAM % b"the old" + DONE + DONE, "not one end"),
        (200, True, STREAM % b"the old", "not one end"),
        (200, True, b'data: {"error": {}}\n\n', "ended with an error"),
        (200, True, b'data: {"error": {}}\n\n' + DONE, "not one end"),
        (503, False, b"{}", "refused"),
        (500, False, b"{}", "not one end"),
    ],
)
def test_a_request_ends_once(status: int, stream: bool, body: bytes, outcome: str) -> None:
    assert Users(cast(Any, None), 0, 1.0)._outcome(status, stream, body) == outcome


def test_a_witness_counts_tokens_by_text() -> None:
    assert witness.text_tokens(STREAM % b"the" + STREAM % b" old sea" + DONE) == 3
    assert witness.text_tokens(b'{"choices":[{"message":{"content":"the old"}}],"usage":{"completion_tokens":9}}') == 2


def test_the_malicious_node_bills_more_and_writes_junk() -> None:
    passed: list[bytes] = []

    class Kept(Reply):
        async def start(self, status: int, content_type: str) -> None:
            pass

        async def pass_on(self, chunk: bytes) -> None:
            passed.append(chunk)

        async def whole(self, status: int, content_type: str, body: bytes) -> None:
            passed.append(body)

    reply = Altered(Kept(), SimpleNamespace(slowness=1.0, billed=3.0), True)
    asyncio.run(reply.pass_on(STREAM % b"the old"))
    asyncio.run(reply.whole(200, "application/json", b'{"usage":{"completion_tokens":7}}'))
    assert passed == [STREAM % b"gur byq", b'{"usage":{"completion_tokens":21}}']
