"""What handing over costs is measured on real processes, and what comes out is what was asked."""

import json
from pathlib import Path

from wwwserve.eval.live import delegated


def test_requests_are_handed_over_signed_and_paid_and_their_parts_timed(tmp_path: Path) -> None:
    out = tmp_path / "delegated.json"
    assert delegated.main(["--seconds", "1", "--connections", "4", "--repeats", "64", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found) == {"signed", "signed_and_paid", "own_engine", "split_us"}
    # Of all requests, those asked one at a time as well.
    share = {name: found[name]["handed_over"] / (found[name]["requests"] + 200) for name in found if name != "split_us"}
    assert min(share["signed"], share["signed_and_paid"]) > share["own_engine"]
    assert set(found["split_us"]) == {"sign", "verify", "journal_origin", "journal_executor"}
    assert all(value > 0 for value in found["split_us"].values())


def test_requests_are_handed_over_without_and_with_tls(tmp_path: Path) -> None:
    out = tmp_path / "delegated.json"
    assert delegated.main(["--tls", "--seconds", "1", "--connections", "4", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert list(found) == ["signed", "signed_tls", "signed_and_paid", "signed_and_paid_tls"]
    assert all(each["handed_over"] > each["requests"] / 2 for each in found.values())
