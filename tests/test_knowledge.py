"""What a provider knows: each message changes what it should, in the row it should, and nothing else."""

import math

import numpy as np
import pytest

from wwwserve.agents import knowledge as k
from wwwserve.agents.classes import MAX_CLASSES
from wwwserve.agents.hardware import profile
from wwwserve.agents.kernel import Floats
from wwwserve.agents.protocol import TARIFF_SIZE


@pytest.fixture
def advert() -> Floats:
    made = np.arange(1.0, 1.0 + k.ADVERT_SIZE)
    made[k.AD_TIME_S] = 100.0
    return made


@pytest.fixture
def peer_stats() -> Floats:
    return k.make_peer_stats()


def changed(before: Floats, after: Floats) -> set[int]:
    return set(np.flatnonzero(before != after).tolist())


def test_a_stranger_has_no_history() -> None:
    peer_stats = k.make_peer_stats(2, 3)
    assert peer_stats.shape == (2, 3, k.PEER_STATS_SIZE)
    advert = np.zeros(k.ADVERT_SIZE)
    for row in peer_stats.reshape(6, -1):
        assert k.sent_since(row, advert) == 0.0
        assert not k.refused_since(row, advert)
        assert (k.pace(row), k.record(row), k.duel_rate(row)) == (0.0, 0.0, 0.5)


def test_what_was_sent_counts_until_the_next_advert(peer_stats: Floats, advert: Floats) -> None:
    for count in (1, 2, 3):
        k.on_sent(peer_stats, advert)
        assert k.sent_since(peer_stats, advert) == count
    newer = advert.copy()
    newer[k.AD_TIME_S] = 103.0
    assert k.sent_since(peer_stats, newer) == 0.0
    k.on_sent(peer_stats, newer)
    assert k.sent_since(peer_stats, newer) == 1.0
    assert peer_stats[k.OUT] == 4.0  # those sent before are still out


def test_what_was_refused_no_longer_counts_as_sent(peer_stats: Floats, advert: Floats) -> None:
    for _ in range(3):
        k.on_sent(peer_stats, advert)
    for left in (2, 1, 0, 0):
        k.on_refused(peer_stats, advert[k.AD_TIME_S])
        assert k.sent_since(peer_stats, advert) == left


def test_a_refusal_says_nothing_of_an_advert_made_since_the_offer(peer_stats: Floats, advert: Floats) -> None:
    k.on_sent(peer_stats, advert)
    newer = advert.copy()
    newer[k.AD_TIME_S] = 103.0
    k.on_sent(peer_stats, newer)
    k.on_refused(peer_stats, 100.0)
    assert k.refused_since(peer_stats, advert) and not k.refused_since(peer_stats, newer)
    assert k.sent_since(peer_stats, newer) == 1.0  # of the newer advert nothing was refused
    k.on_refused(peer_stats, 103.0)
    assert k.refused_since(peer_stats, newer) and k.sent_since(peer_stats, newer) == 0.0
    k.on_refused(peer_stats, 100.0)  # later than the answer to what was offered after it
    assert k.refused_since(peer_stats, newer)


def test_ended_requests_are_no_longer_out_and_never_negative(peer_stats: Floats, advert: Floats) -> None:
    k.on_sent(peer_stats, advert)
    k.on_sent(peer_stats, advert)
    k.on_ended(peer_stats)
    assert peer_stats[k.OUT] == 1.0
    assert k.sent_since(peer_stats, advert) == 2.0  # the advert still does not show them
    k.on_ended(peer_stats)
    k.on_ended(peer_stats)
    assert peer_stats[k.OUT] == 0.0


def test_a_refusal_is_forgotten_with_the_next_advert(peer_stats: Floats, advert: Floats) -> None:
    k.on_refused(peer_stats, advert[k.AD_TIME_S])
    assert k.refused_since(peer_stats, advert)
    advert[k.AD_TIME_S] += 3.0
    assert not k.refused_since(peer_stats, advert)


def test_messages_of_one_peer_leave_the_others_alone(advert: Floats) -> None:
    table = k.make_peer_stats(3, 4)
    before = table.copy()
    k.on_sent(table[1, 2], advert)
    k.on_refused(table[1, 2], advert[k.AD_TIME_S])
    k.on_answer(table[1, 2], 8.0, 4.0)
    k.on_progress(table[1, 2], 9.0, 4.0, 0.5, 3.0)
    touched = np.argwhere((table != before).any(axis=-1))
    assert touched.tolist() == [[1, 2]]


def test_the_record_is_an_aged_mean_of_log_ratios(peer_stats: Floats) -> None:
    k.on_answer(peer_stats, 8.0, 4.0)
    assert k.record(peer_stats) == pytest.approx(math.log(2) / 2)
    k.on_answer(peer_stats, 3.0, 9.0)
    assert peer_stats[k.RECORD] == pytest.approx(0.9 * math.log(2) - math.log(3))
    assert k.record(peer_stats) == pytest.approx((0.9 * math.log(2) - math.log(3)) / (1 + 1.9))
    for _ in range(200):
        k.on_answer(peer_stats, 5.0, 2.0)
    assert k.record(peer_stats) == pytest.approx(math.log(2.5) * 10 / 11, rel=1e-6)  # the weight tends to 10


def test_a_record_of_no_time_at_all_is_finite(peer_stats: Floats) -> None:
    k.on_answer(peer_stats, 0.0, 5.0)
    k.on_answer(peer_stats, 5.0, 0.0)
    assert math.isfinite(k.record(peer_stats))


def test_progress_counts_only_what_was_promised_by_now(peer_stats: Floats) -> None:
    k.on_progress(peer_stats, 1.9, 2.0, 0.5, 0)  # not due yet
    assert (peer_stats[k.PROMISED], peer_stats[k.STREAMED], peer_stats[k.OVERDUE_S]) == (0, 0, 0)
    k.on_progress(peer_stats, 5.0, 2.0, 0.5, 4)  # 1 + 3 / 0.5 = 7 promised, 4 there
    assert (peer_stats[k.PROMISED], peer_stats[k.STREAMED], peer_stats[k.OVERDUE_S]) == (7, 4, 0)
    k.on_progress(peer_stats, 3.0, 2.0, 0.25, 100)  # ahead of its promise: no credit beyond it
    assert (peer_stats[k.PROMISED], peer_stats[k.STREAMED], peer_stats[k.OVERDUE_S]) == (12, 9, 0)
    k.on_progress(peer_stats, 8.0, 2.0, 0.5, 0)  # nothing yet, 6 s late
    assert (peer_stats[k.PROMISED], peer_stats[k.STREAMED], peer_stats[k.OVERDUE_S]) == (25, 9, 6)
    assert k.pace(peer_stats) == pytest.approx(math.log(225 / 209))
    k.clear_progress(peer_stats)
    assert (peer_stats[k.PROMISED], peer_stats[k.STREAMED], peer_stats[k.OVERDUE_S]) == (0, 0, 0)


def test_pace_needs_evidence_and_tends_to_the_true_ratio(peer_stats: Floats) -> None:
    paces = []
    for promised in (10.0, 1000.0, 1e6):
        peer_stats[k.PROMISED], peer_stats[k.STREAMED] = promised, promised / 4
        paces.append(k.pace(peer_stats))
    assert 0 < paces[0] < 0.05 < paces[1] < paces[2]
    assert paces[2] == pytest.approx(math.log(4), abs=0.001)


def test_duel_rate_leaves_one_half_slowly(peer_stats: Floats) -> None:
    peer_stats[k.DUELS_WON], peer_stats[k.DUELS_LOST] = 3.0, 1.0
    assert k.duel_rate(peer_stats) == 4 / 6


def test_a_scrape_writes_load_and_nothing_else(advert: Floats) -> None:
    before = advert.copy()
    k.on_scrape(advert, 200.0, 7, 4, 512, 900, np.inf)
    written = [k.AD_TIME_S, k.AD_RUNNING, k.AD_WAITING, k.AD_KV_TOKENS, k.AD_PREFILL, k.AD_REUSE_S]
    assert changed(before, advert) == {*written}
    assert advert[written].tolist() == [200.0, 7.0, 4.0, 512.0, 900.0, k.LONGEST_REUSE_S]


def test_a_load_that_is_misreported_is_so_in_all_its_parts(advert: Floats) -> None:
    k.on_scrape(advert, 200.0, 7, 3, 512, 900, 60.0)
    advert[k.AD_HELD : k.AD_HELD + MAX_CLASSES] = 2.0
    before = advert.copy()
    k.misreport_load(advert, 0.5)
    load = [k.AD_RUNNING, k.AD_WAITING, k.AD_KV_TOKENS, k.AD_PREFILL, *range(k.AD_HELD, k.AD_HELD + MAX_CLASSES)]
    assert changed(before, advert) == {*load}
    np.testing.assert_array_equal(advert[load], 0.5 * before[load])


def test_mean_lengths_follow_what_was_completed(advert: Floats) -> None:
    advert[k.AD_MEAN_PROMPT], advert[k.AD_MEAN_OUTPUT] = 100.0, 400.0
    before = advert.copy()
    advert[k.AD_MEAN_UNCACHED] = before[k.AD_MEAN_UNCACHED] = 80.0
    k.on_length(advert, 300, 120, 200)
    assert changed(before, advert) == {k.AD_MEAN_PROMPT, k.AD_MEAN_UNCACHED, k.AD_MEAN_OUTPUT}
    assert advert[k.AD_MEAN_UNCACHED] == pytest.approx(81.0)
    assert advert[k.AD_MEAN_PROMPT] == pytest.approx(102.0)
    assert advert[k.AD_MEAN_OUTPUT] == pytest.approx(398.0)


@pytest.mark.parametrize("speed", [1.0, 1.5])
def test_a_profile_in_an_advert(advert: Floats, speed: float) -> None:
    p = profile("a100-80g", "llama-3-8b", max_num_seqs=48)
    before = advert.copy()
    k.write_profile(advert, p.row(), speed)
    np.testing.assert_array_equal(advert[: k.AD_WEIGHT_S], before[: k.AD_WEIGHT_S])
    times = [p.weight_s, p.per_seq_s, p.per_kv_token_s, p.prefill_base_s, p.per_token_s, p.per_pair_s]
    np.testing.assert_allclose(advert[k.AD_WEIGHT_S : k.AD_KV_CAPACITY] * speed, times, rtol=1e-15)
    assert advert[k.AD_KV_CAPACITY] == p.kv_tokens
    assert advert[k.AD_MAX_NUM_SEQS] == 48


def test_columns_do_not_overlap() -> None:
    columns = {name: value for name, value in vars(k).items() if name.startswith("AD_")}
    columns |= {f"held of class {c}": k.AD_HELD + c for c in range(1, MAX_CLASSES)}
    columns |= {f"tariff, column {t}": k.AD_TARIFF + t for t in range(1, TARIFF_SIZE)}
    assert sorted(columns.values()) == list(range(k.ADVERT_SIZE))


def test_a_rate_ages_and_is_never_negative_however_long_a_process_was_stopped() -> None:
    assert k.aged_rate(2.0, 6.0) == pytest.approx(1.8)
    assert [k.aged_rate(2.0, long_s) for long_s in (k.RATE_WINDOW_S, 300.0, 1e9)] == [0.0, 0.0, 0.0]
