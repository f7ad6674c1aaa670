"""The engine by hand in small cases, against a token-by-token reference, and what it must never lose count of."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_engine import Job, ReferenceEngine

from wwwserve.agents.hardware import BLOCK_TOKENS, Profile
from wwwserve.agents.kernel import records
from wwwserve.envs.engine import (
    ENGINE,
    JOB,
    MAX_SLOTS,
    NEVER,
    abort,
    advance,
    kv_use,
    reset_engine,
    reset_jobs,
    submit,
    tokens_out,
)
from wwwserve.envs.prefix_cache import NO_CACHE

FAR_S = 1e5


def round_profile(*, kv_blocks: int = 100, max_num_seqs: int = 8, max_batched_tokens: int = 64) -> Profile:
    """Decode takes 1 + 0.1 n + 0.01 kv seconds; with prefill the 1 becomes max(1, 0.5 + 0.05 (prefill + n))."""
    return Profile(1.0, 0.1, 0.01, 0.5, 0.05, kv_blocks, max_num_seqs, max_batched_tokens, 4096, "test")


class Engine:
    """One engine and its requests, each (prompt, output, submit_s)."""

    def __init__(self, profile: Profile, requests: Sequence[tuple[int, int, float]] = (), room: int = 64) -> None:
        self.records = records(1, ENGINE)
        self.e = self.records[0]
        reset_engine(self.e, profile.row())
        self.q = records(room, JOB)
        reset_jobs(self.q)
        self.done = np.zeros(room, np.int64)
        self.finished: list[int] = []
        self.count = 0
        for request in requests:
            self.submit(*request)

    def submit(self, prompt: int, output: int, submit_s: float) -> int:
        r = self.count
        self.count += 1
        self.q[r]["prompt"], self.q[r]["output"] = prompt, output
        submit(self.e, NO_CACHE, self.q, r, submit_s)
        return r

    def advance(self, until_s: float) -> None:
        """Run to `until_s`; the requests that finish get their time from the engine."""
        count = advance(self.e, NO_CACHE, self.q, until_s, self.done, 0)
        self.finished += self.done[:count].tolist()

    def finish_s(self) -> list[float]:
        return self.q["finish_s"][: self.count].tolist()

    def first_token_s(self) -> list[float]:
        return self.q["first_token_s"][: self.count].tolist()

    def running(self) -> list[int]:
        return self.e["slots"][: self.e["running"]].tolist()

    def waiting(self) -> list[int]:
        found, r = [], int(self.e["wait_head"])
        while r >= 0:
            found.append(r)
            r = int(self.q[r]["next"])
        assert self.e["wait_tail"] == (found[-1] if found else -1)
        return found

    def check_conservation(self) -> None:
        """Blocks, tokens and counts add up, each computed anew from the requests."""
        held_blocks = context = decoding = 0
        phase = np.zeros(BLOCK_TOKENS, np.int64)
        for r in self.running():
            job = self.q[r]
            if job["finish_tick"] == NEVER:
                held = int(job["prompt"] + job["generated"])
                assert 0 < job["prefill_left"] <= held
            else:
                held = int(job["prompt"]) + int(tokens_out(self.e, self.q, r)) - 1
                decoding += 1
                context += held
                phase[(self.e["tick"] - held) % BLOCK_TOKENS] += 1
            held_blocks += -(-held // BLOCK_TOKENS)
        total = int(self.e["profile"][5])
        assert self.e["free_blocks"] >= 0
        assert self.e["free_blocks"] + held_blocks == total
        assert kv_use(self.e) == pytest.approx(held_blocks / total)
        assert self.e["kv_tokens"] == context
        assert self.e["decoding"] == decoding == self.e["phase"].sum()
        assert self.e["phase"].tolist() == phase.tolist()
        waiting = self.waiting()
        assert self.e["waiting"] == len(waiting)
        assert self.e["wait_tokens"] == sum(int(self.q[r]["prompt"] + self.q[r]["generated"]) for r in waiting)
        assert len({*waiting, *self.running()}) == len(waiting) + self.e["running"]


def test_a_lone_request() -> None:
    engine = Engine(round_profile(), [(20, 4, 0.0)])
    engine.advance(FAR_S)
    prefill_s = 0.5 + 0.05 * 20  # 1.5, more than the weight read
    decodes_s = (1 + 0.1 + 0.20) + (1 + 0.1 + 0.21) + (1 + 0.1 + 0.22)  # over 20, 21, 22 tokens of context
    assert engine.first_token_s() == pytest.approx([prefill_s])
    assert engine.finish_s() == pytest.approx([prefill_s + decodes_s])  # 5.43
    assert engine.e["free_blocks"] == 100 and engine.e["kv_tokens"] == 0


def test_a_short_prompt_hides_under_the_weight_read() -> None:
    engine = Engine(round_profile(), [(4, 2, 2.0)])
    engine.advance(FAR_S)
    assert engine.first_token_s() == pytest.approx([2 + 1.0])  # 0.5 + 0.05 * 4 = 0.7 < 1
    assert engine.finish_s() == pytest.approx([3 + 1 + 0.1 + 0.04])


def test_one_token_of_output_is_the_prefill() -> None:
    engine = Engine(round_profile(), [(40, 1, 0.0)])
    engine.advance(FAR_S)
    assert engine.first_token_s() == engine.finish_s() == pytest.approx([2.5])  # 0.5 + 0.05 * 40


def test_a_full_batch() -> None:
    engine = Engine(round_profile(max_num_seqs=3), [(10, 2, 0.0), (12, 3, 0.0), (14, 4, 0.0), (8, 2, 0.0)])
    engine.advance(0.5 + 0.05 * 36)  # the three prompts together, 2.3
    assert engine.running() == [0, 1, 2] and engine.waiting() == [3]
    engine.advance(FAR_S)
    first = 2.3 + (1 + 0.3 + 0.36)  # 3.96: all three decode over 36 tokens; request 0 is done, 3 takes its slot
    second = first + (1 + 0.2 + 0.28)  # 5.44: contexts 13 and 15; a prompt of 8 beside two decodes: 0.5 + 0.05 * 10 = 1
    third = second + (1 + 0.2 + 0.24)  # 6.88: contexts 16 and 8
    assert engine.first_token_s() == pytest.approx([2.3, 2.3, 2.3, second])
    assert engine.finish_s() == pytest.approx([first, second, third, third])
    assert engine.finished == [0, 1, 2, 3]


def test_a_queue_is_served_in_order_of_arrival() -> None:
    engine = Engine(round_profile(max_num_seqs=1), [(10, 2, 0.4), (10, 3, 0.2), (10, 1, 0.3)])
    engine.advance(1.3)  # 0.2 + a prompt of 10: max(1, 0.5 + 0.5) = 1 is over at 1.2
    assert engine.running() == [1] and engine.waiting() == [2, 0]
    engine.advance(FAR_S)
    second = 1.2 + (1.1 + 0.10) + (1.1 + 0.11)  # 3.61: request 1, contexts 10 and 11
    last = second + 1 + 1  # request 2 is its prefill alone; then that of request 0
    assert engine.first_token_s() == pytest.approx([last, 1.2, second + 1])
    assert engine.finish_s() == pytest.approx([last + 1.1 + 0.10, second, second + 1])
    assert engine.finished == [1, 2, 0]


def test_two_slots() -> None:
    engine = Engine(round_profile(max_num_seqs=2), [(10, 3, 0.0), (20, 2, 0.0), (30, 1, 0.0)])
    engine.advance(FAR_S)
    prefill = 0.5 + 0.05 * 30  # 2.0: the first two
    decode = prefill + 1 + 0.2 + 0.30  # 3.5: request 1 is done
    mixed = decode + (0.5 + 0.05 * (30 + 1)) + 0.1 + 0.11  # 5.76: request 2 beside request 0, both done
    assert engine.finish_s() == pytest.approx([mixed, decode, mixed])
    assert engine.first_token_s() == pytest.approx([prefill, prefill, mixed])


def test_a_long_prompt_is_computed_in_chunks_while_others_decode() -> None:
    engine = Engine(round_profile(max_batched_tokens=16), [(4, 10, 0.0), (40, 2, 0.5)])
    engine.advance(4.0)
    assert engine.q["prefill_left"][1] == 10 and tokens_out(engine.e, engine.q, 0) == 3
    engine.advance(FAR_S)
    start = 1.0  # the prompt of 4
    chunk_1 = start + (0.5 + 0.05 * 16) + 0.1 + 0.04  # 2.44: 15 tokens of prompt beside a decode over 4
    chunk_2 = chunk_1 + (0.5 + 0.05 * 16) + 0.1 + 0.05  # 3.89
    chunk_3 = chunk_2 + (0.5 + 0.05 * 11) + 0.1 + 0.06  # 5.10: the other 10
    both = chunk_3 + 1 + 0.2 + 0.47  # 6.77: contexts 7 and 40
    alone = both + 5 * 1.1 + 0.01 * (8 + 9 + 10 + 11 + 12)  # 12.77
    assert engine.first_token_s() == pytest.approx([start, chunk_3])
    assert engine.finish_s() == pytest.approx([alone, both])


def test_a_measured_engine_attends_and_decodes_beside_a_prefill_as_it_was_measured() -> None:
    profile = Profile(1.0, 0.1, 0.01, 0.5, 0.05, 100, 8, 16, 4096, "test", seq_tokens=0.5, per_pair_s=0.001)
    engine = Engine(profile, [(4, 10, 0.0), (40, 2, 0.5)])
    engine.advance(FAR_S)
    first = 1.0  # the prompt of 4, hidden
    chunk_1 = first + (0.5 + 0.05 * (15 + 0.5) + 0.001 * 15 * 7.5) + 0.1 + 0.04
    chunk_2 = chunk_1 + (0.5 + 0.05 * (15 + 0.5) + 0.001 * 15 * (15 + 7.5)) + 0.1 + 0.05
    chunk_3 = chunk_2 + (0.5 + 0.05 * (10 + 0.5) + 0.001 * 10 * (30 + 5)) + 0.1 + 0.06
    assert engine.first_token_s() == pytest.approx([first, chunk_3])


def test_a_prompt_that_exceeds_the_budget_leaves_the_next_one_waiting() -> None:
    engine = Engine(round_profile(max_batched_tokens=16), [(20, 1, 0.0), (10, 1, 0.0), (30, 1, 0.0)])
    engine.advance(FAR_S)
    full = 0.5 + 0.05 * 16  # 1.3: 16 of request 0; then 4 of it, 10 of request 1, 2 of request 2; then 16 and 12 of it
    last = 0.5 + 0.05 * 12
    assert engine.finish_s() == pytest.approx([2 * full, 2 * full, 3 * full + last])


def test_the_newest_is_preempted_and_recomputes_what_it_had() -> None:
    engine = Engine(round_profile(kv_blocks=4), [(16, 20, 0.0), (30, 10, 0.0)])
    start = 0.5 + 0.05 * 46  # 2.8; 1 and 2 blocks, 1 free
    second = start + 1.2 + 0.46  # 4.46; request 0, at 16 tokens, took the last block
    third = second + 1.2 + 0.48  # 6.14; request 1 is at 32 tokens and finds none
    engine.advance(third + 1e-6)
    engine.check_conservation()
    assert engine.running() == [0] and engine.waiting() == [1]
    assert engine.q["generated"][1] == 3 and engine.e["wait_tokens"] == 33
    engine.advance(FAR_S)
    alone = third + 17 * 1.1 + 0.01 * sum(range(18, 35))  # 29.26; meanwhile 33 tokens need 3 of 4 blocks
    again = alone + 0.5 + 0.05 * 33  # 31.41; prompt and 3 tokens, which gives the 4th
    end = again + 6 * 1.1 + 0.01 * sum(range(33, 39))  # 40.14
    assert engine.e["preemptions"] == 1
    assert engine.first_token_s() == pytest.approx([start, start])
    assert engine.finish_s() == pytest.approx([alone, end])


def test_a_prompt_that_finds_no_blocks_waits_for_a_release() -> None:
    engine = Engine(round_profile(kv_blocks=4), [(17, 2, 0.0), (33, 1, 0.0), (1, 1, 0.0)])
    engine.advance(FAR_S)
    first = 0.5 + 0.05 * 17  # 1.35; 2 blocks of 4; the next prompt needs 3, and none overtakes it
    done = first + 1.1 + 0.17  # 2.62
    assert engine.finish_s() == pytest.approx([done, *[done + 0.5 + 0.05 * 34] * 2])
    assert engine.e["preemptions"] == 0


def test_who_comes_during_an_iteration_joins_the_next() -> None:
    engine = Engine(round_profile(), [(20, 3, 0.0)])
    engine.advance(1.6)  # the prefill ended at 1.5
    engine.submit(10, 1, 1.7)
    engine.advance(2.79)
    assert engine.running() == [0] and engine.waiting() == [1]
    engine.advance(FAR_S)
    decode = 1.5 + 1.1 + 0.20  # 2.8, the iteration that was in progress at 1.7
    joined = decode + (0.5 + 0.05 * 11) + 0.1 + 0.21  # 4.16
    assert engine.first_token_s()[1] == pytest.approx(joined)
    assert engine.finish_s() == pytest.approx([joined, joined])


def test_who_comes_at_a_boundary_joins_the_iteration_that_starts_there() -> None:
    engine = Engine(round_profile(), [(20, 2, 0.0), (10, 1, 1.5)])
    engine.advance(FAR_S)
    assert engine.first_token_s()[1] == pytest.approx(1.5 + (0.5 + 0.05 * 11) + 0.1 + 0.20)


def test_submissions_out_of_order_wait_in_order() -> None:
    engine = Engine(round_profile(), [(10, 1, 3.0), (10, 1, 1.0), (10, 1, 2.0), (10, 1, 2.0)])
    assert engine.waiting() == [1, 2, 3, 0]
    engine.advance(FAR_S)
    assert engine.finish_s() == pytest.approx([4.5, 2.0, 3.5, 3.5])  # 2 and 3 together: 0.5 + 0.05 * 20 = 1.5 from 2.0


def test_abort_in_the_queue() -> None:
    engine = Engine(round_profile(max_num_seqs=1), [(10, 2, 0.0), (11, 2, 0.0), (12, 2, 0.0), (13, 2, 0.0)])
    engine.advance(1.1)
    for r, rest in ((2, [1, 3]), (3, [1]), (1, [])):  # from the middle, the tail, the head
        assert abort(engine.e, NO_CACHE, engine.q, r)
        assert engine.waiting() == rest
        engine.check_conservation()
    assert not abort(engine.e, NO_CACHE, engine.q, 2)
    engine.advance(FAR_S)
    assert engine.finished == [0]
    assert engine.finish_s()[0] == pytest.approx(1 + 1.1 + 0.10)


def test_abort_while_running() -> None:
    engine = Engine(round_profile(max_num_seqs=2), [(16, 9, 0.0), (8, 4, 0.0), (8, 1, 0.0)])
    prefill = 0.5 + 0.05 * 24  # 1.7
    engine.advance(prefill + 1.2 + 0.24 + 1e-6)  # 3.14: one decode more
    assert abort(engine.e, NO_CACHE, engine.q, 0)
    engine.check_conservation()
    assert engine.q["generated"][0] == 2 and np.isnan(engine.q["finish_s"][0])
    engine.advance(FAR_S)
    joined = 3.14 + 1.0 + 0.1 + 0.09  # request 2 has the slot: 0.5 + 0.05 * 9 < 1, beside a decode over 9
    assert engine.finished == [2, 1]
    assert engine.finish_s()[1:] == pytest.approx([joined + 1.1 + 0.10, joined])
    assert not abort(engine.e, NO_CACHE, engine.q, 1)  # done already


def test_abort_during_a_chunked_prefill_frees_the_whole_prompt() -> None:
    engine = Engine(round_profile(max_batched_tokens=16, kv_blocks=5), [(40, 3, 0.0), (60, 1, 0.0)])
    engine.advance(1.4)
    assert engine.q["prefill_left"][0] == 24 and engine.e["free_blocks"] == 2
    assert abort(engine.e, NO_CACHE, engine.q, 0)
    engine.check_conservation()
    assert engine.e["free_blocks"] == 5
    engine.advance(FAR_S)
    assert engine.finish_s()[1] == pytest.approx(1.3 + 3 * 1.3 + (0.5 + 0.05 * 12))  # 16, 16, 16, 12 tokens


def test_an_idle_engine_keeps_its_clock() -> None:
    engine = Engine(round_profile())
    engine.advance(7.25)
    assert engine.e["clock_s"] == 7.25 and engine.finished == []


def test_too_many_slots_are_refused() -> None:
    with pytest.raises(ValueError, match=f"max_num_seqs is {MAX_SLOTS + 1}, an engine has at most {MAX_SLOTS}"):
        Engine(round_profile(max_num_seqs=MAX_SLOTS + 1))


# Against the reference. Coefficients without a common measure keep events of the two from falling together by rounding.

ODD = (1.0131, 0.0173, 0.000917, 0.3019, 0.0231)


def compare(engine: Engine, reference: ReferenceEngine, jobs: list[Job]) -> None:
    engine.check_conservation()
    assert engine.running() == [job.name for job in reference.running]
    assert engine.waiting() == [job.name for job in reference.waiting]
    assert engine.e["preemptions"] == reference.preemptions
    assert engine.e["free_blocks"] == reference.free
    assert math.isclose(engine.e["clock_s"], reference.clock_s, rel_tol=1e-9)
    for job in jobs:
        assert tokens_out(engine.e, engine.q, job.name) == job.generated
        for mine, theirs in (("finish_s", job.finish_s), ("first_token_s", job.first_token_s)):
            value = float(engine.q[mine][job.name])
            assert math.isnan(value) if theirs is None else math.isclose(value, theirs, rel_tol=1e-9)
    assert sorted(engine.finished) == [job.name for job in jobs if job.finish_s is not None]


requests = st.tuples(st.just("submit"), st.integers(1, 70), st.integers(1, 90), st.integers(0, 3000))
steps = st.tuples(
    st.integers(0, 20_000),  # ms until it happens
    st.one_of(requests, requests, requests, st.tuples(st.just("abort"), st.integers(0, 39)), st.just(("look",))),
)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    kv_blocks=st.integers(4, 24),
    slots=st.integers(1, 6),
    budget=st.integers(0, 60),
    script=st.lists(steps, max_size=40),
    busy=st.sampled_from([0.02, 0.2, 1.0]),
    measured=st.sampled_from([(), (0.3, 0.00171), (0.7, 0.0, (0.1013, -0.0471, 0.0317))]),
)
def test_the_engine_agrees_with_the_reference(
    kv_blocks: int,
    slots: int,
    budget: int,
    script: list[tuple[int, tuple]],
    busy: float,
    measured: tuple,
) -> None:
    profile = Profile(*ODD, kv_blocks, slots, slots + budget, 4096, "test", *measured)
    engine, reference = Engine(profile), ReferenceEngine(profile)
    jobs: list[Job] = []
    now_s = 0.0
    for wait_ms, (what, *numbers) in script:
        now_s += wait_ms / 1000 * busy
        engine.advance(now_s)
        reference.advance(now_s)
        compare(engine, reference, jobs)
        if what == "submit":
            prompt, output, later_ms = numbers
            prompt = min(prompt, 16 * kv_blocks - 1)
            output = min(output, 16 * kv_blocks - prompt)
            job = Job(len(jobs), prompt, output, now_s + later_ms / 1000)
            jobs.append(job)
            reference.submit(job)
            assert engine.submit(prompt, output, job.submit_s) == job.name
        elif what == "abort" and jobs:
            job = jobs[numbers[0] % len(jobs)]
            assert abort(engine.e, NO_CACHE, engine.q, job.name) == reference.abort(job)
            engine.check_conservation()
    while reference.running or reference.waiting:
        now_s += 1000.0
        engine.advance(now_s)
        reference.advance(now_s)
        compare(engine, reference, jobs)


@pytest.mark.parametrize("seed", range(4))
def test_chopping_time_changes_nothing(seed: int) -> None:
    """A catalogue-like profile under load with preemptions: one call, and hundreds at random times."""
    rng = np.random.default_rng(seed)
    profile = Profile(0.0103, 4.4e-05, 8.6e-08, 0.0034, 7.8e-05, 120 + 30 * seed, 12 + seed, 256, 4096, "test")
    arrivals = np.cumsum(rng.exponential(0.4, 60))
    work = [(int(p), int(o), float(t)) for p, o, t in zip(*rng.integers(1, 400, (2, 60)), arrivals, strict=True)]
    whole, chopped = Engine(profile, work), Engine(profile, work)
    whole.advance(FAR_S)
    assert whole.e["preemptions"] > 0 and len(whole.finished) == 60
    for until_s in np.sort(rng.uniform(0, 1.2 * np.nanmax(whole.finish_s()), 400)):
        chopped.advance(float(until_s))
        chopped.check_conservation()
    chopped.advance(FAR_S)
    np.testing.assert_array_equal(chopped.finish_s(), whole.finish_s())
    np.testing.assert_array_equal(chopped.first_token_s(), whole.first_token_s())
    assert chopped.e["preemptions"] == whole.e["preemptions"]
