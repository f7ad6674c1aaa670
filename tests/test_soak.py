"""Paying nodes that are killed, filled up, put in another time and cut off; a short run of `eval.live.soak`."""

import json
from pathlib import Path

import pytest

from wwwserve.eval.live import soak


def test_all_is_accounted_for_after_kills_a_full_disk_a_wrong_clock_and_a_partition(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    assert soak.main(["--kills", "3", "--seed", "1", "--rate", "6", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["kills"] == found["journals_verified_after_kills"] == 3 and found["channels_that_agree"] == 10
    assert set(found["faults"]) == {"full disk", "clock off", "partition"}
    assert found["faults"]["full disk"]["answered_meanwhile"] > 0
    assert found["ended"]["answered"] > 20 and found["receipts"] > 10 and found["paid_credits"] > 0
    assert found["billed_twice"] == 0 and found["problems"] == []


def test_a_bad_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--kills", "0"]) == 2
    assert "--kills is 0, expected at least 1" in capsys.readouterr().err
