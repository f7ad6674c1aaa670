"""Continuous batching in plain Python, iteration by iteration and token by token: what `envs.engine` must agree with.

Written from the rules alone. The iteration that starts at `clock_s` is composed once, at its start: it decodes one
token of every decoding request and prefills with the rest of its token budget. Withdrawing a request composes the
iteration in progress anew.
"""

from dataclasses import dataclass, field

import numpy as np

from wwwserve.agents.hardware import Profile

BLOCK = 16


def blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


@dataclass
class Job:
    """One request; `cached` counts its tokens in the KV cache, `prefilled` is False until its prompt is computed."""

    name: int
    prompt: int
    output: int
    submit_s: float
    generated: int = 0
    cached: int = 0
    prefilled: bool = False
    first_token_s: float | None = None
    finish_s: float | None = None

    @property
    def reserved(self) -> int:
        """KV blocks while it runs: the whole prompt from its admission, then as many as its tokens fill."""
        return blocks(self.cached) if self.prefilled else blocks(self.prompt + self.generated)


@dataclass
class Iteration:
    end_s: float
    decoding: list[Job]
    prefill: list[tuple[Job, int]]
    admitted: list[Job]


@dataclass
class ReferenceEngine:
    profile: Profile
    clock_s: float = 0.0
    preemptions: int = 0
    running: list[Job] = field(default_factory=list)
    waiting: list[Job] = field(default_factory=list)
    current: Iteration | None = None

    @property
    def free(self) -> int:
        return self.profile.kv_blocks - sum(job.reserved for job in self.running)

    def submit(self, job: Job) -> None:
        place = len(self.waiting)
        while place > 0 and self.waiting[place - 1].submit_s > job.submit_s:
            place -= 1
        self.waiting.insert(place, job)

    def abort(self, job: Job) -> bool:
        self.current = None
        if job in self.waiting:
            self.waiting.remove(job)
            return True
        if job in self.running:
            self.running.remove(job)
            return True
        return False

    def advance(self, until_s: float) -> None:
        while True:
            if not self.running:
                if not self.waiting or self.waiting[0].submit_s > until_s:
                    self.clock_s = max(self.clock_s, until_s)
                    return
                self.clock_s = max(self.clock_s, self.waiting[0].submit_s)
            if self.current is None:
                self.current = self._compose()
            if self.current.end_s > until_s:
                return
            self._finish(self.current)
            self.current = None

    def _compose(self) -> Iteration:
        while sum(job.prefilled and job.cached % BLOCK == 0 for job in self.running) > self.free:
            newest = self.running.pop()
            newest.cached, newest.prefilled = 0, False
            self.waiting.insert(0, newest)
            self.preemptions += 1
        decoding = [job for job in self.running if job.prefilled]
        budget = self.profile.max_batched_tokens - len(decoding)
        prefill = []
        pairs = 0.0
        for job in self.running:
            if not job.prefilled:
                tokens = min(job.prompt + job.generated - job.cached, budget)
                pairs += tokens * job.cached + tokens * tokens / 2
                prefill.append((job, tokens))
                budget -= tokens
        spare = self.free - sum(job.cached % BLOCK == 0 for job in decoding)
        admitted: list[Job] = []
        for job in self.waiting:
            whole = job.prompt + job.generated
            slots = self.profile.max_num_seqs - len(self.running) - len(admitted)
            if job.submit_s > self.clock_s or budget <= 0 or slots <= 0 or blocks(whole) > spare:
                break
            tokens = min(whole, budget)
            pairs += tokens * tokens / 2
            prefill.append((job, tokens))
            admitted.append(job)
            budget -= tokens
            spare -= blocks(whole)
        p, count, computed = self.profile, len(decoding), sum(tokens for _, tokens in prefill)
        time_s = p.weight_s
        if computed > 0:
            computed_s = p.per_token_s * (computed + p.seq_tokens * count) + p.per_pair_s * pairs
            time_s = max(p.weight_s, p.prefill_base_s + computed_s)
        elif p.batch_s:
            knots = 2.0 ** np.arange(len(p.batch_s))
            time_s += float(np.interp(count, knots, p.batch_s))
        time_s += p.per_seq_s * count + p.per_kv_token_s * sum(job.cached for job in decoding)
        return Iteration(self.clock_s + time_s, decoding, prefill, admitted)

    def _finish(self, iteration: Iteration) -> None:
        self.clock_s = iteration.end_s
        for job in iteration.admitted:
            self.waiting.remove(job)
            self.running.append(job)
        for job in iteration.decoding:
            job.cached += 1
            job.generated += 1
        for job, tokens in iteration.prefill:
            job.cached += tokens
            if job.cached == job.prompt + job.generated:
                job.prefilled = True
                job.generated += 1
                if job.first_token_s is None:
                    job.first_token_s = self.clock_s
        for job in [job for job in self.running if job.prefilled and job.generated == job.output]:
            job.finish_s = self.clock_s
            self.running.remove(job)
