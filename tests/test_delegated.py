"""What handing over costs is measured on real processes, and what comes out is what was asked."""

import json
from pathlib import Path

from wwwserve.eval.live import delegated


def test_requests_are_handed_over_signed_and_paid_and_their_parts_timed(tmp_path: Path) -> None:
    out = tmp_path / "delegated.json"
    assert delegated.main(["--seconds", "1", "--connections", "4", "--repeats", "64", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found) == {"signed", "signed_and_paid", "own_engine", "split_us"}
    for name in ("signed", "signed_and_paid"):
        assert found[name]["handed_over"] > 0.5 * (found[name]["requests"] + 200)  # those asked one at a time as well
    assert found["own_engine"]["handed_over"] < 0.5 * (found["own_engine"]["requests"] + 200)
    assert set(found["split_us"]) == {"sign", "verify", "journal_origin", "journal_executor"}
    assert all(value > 0 for value in found["split_us"].values())
