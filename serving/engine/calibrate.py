"""Measure what a running engine can do: the coefficients of `agents.hardware.Profile`, from its answers' times.

Two kinds of probe, with prompts of words drawn anew so that no prefix is cached:

- A prompt alone, of which the time to first token is one iteration with prefill, and what the way to the engine adds;
  also such that begin as one that was just computed, where the engine says that it had that cached.
- A stream that joins others: between its first token and its last, every iteration decodes all of them. How many tokens
  it got is told at its end; dividing gives the time of an iteration. The one that computed its prompt is where the
  others' tokens were longer apart.

All loads are measured in turn, several times over, and of each the median is taken, so that what disturbs the engine
for a while disturbs one measurement of each. Errors are those of a fit for which some loads in between were held out,
and tell how far off it is where it was not made; the profile is a fit to all loads. What cannot be a time, and a fit
that is far off, are refused.
"""

import asyncio
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import yaml

from wwwserve.agents.hardware import BLOCK_TOKENS, CHUNK_TOKENS, Profile
from wwwserve.serving.config import MeasuredProfile
from wwwserve.serving.engine.fit import AFTER_CACHED, CalibrationError, Errors, Sample, errors, fit
from wwwserve.serving.engine.probe import (
    MARGIN,
    Limits,
    Prober,
    Settings,
    connected,
    find_max_num_seqs,
    find_model,
    get,
    kv_tokens_of,
    settle,
)
from wwwserve.serving.http.addresses import engine_base

ALONE_S, MOST_ALONE = 0.5, 8  # in a turn, for a prompt alone: the time of a short one is easily disturbed
TRIES = 3  # of a load whose time comes out as none
MOST_ERROR = 0.2  # relative, mean over the loads of a kind that are held out

Say = Callable[[str], None]


class Calibration(NamedTuple):
    """What was found."""

    url: str
    model: str
    profile: Profile
    overhead_s: float  # of a request, beside the engine's iterations: to the engine, tokens of its words, and back
    errors: dict[str, Errors]  # by kind of load, fitted and held out
    samples: list[Sample]

    def yaml(self) -> str:
        """The engine as node.yaml has it, with its profile."""
        engine = {"url": self.url, "profile": {"kind": "measured", **measured(self.profile)}}
        return yaml.safe_dump({"engine": engine}, sort_keys=False, width=120)

    def json(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "url": self.url, "model": self.model, "profile": measured(self.profile), "overhead_s": self.overhead_s,
            "errors": {name: each._asdict() for name, each in self.errors.items()},
            "samples": [sample._asdict() for sample in self.samples],
        }  # fmt: skip

    def report(self) -> str:
        """The errors in words."""
        lines = [f"{name:<31}{e.loads:3d} loads, relative error mean {e.mean:6.1%}, p90 {e.p90:6.1%}"
                 for name, e in self.errors.items()]  # fmt: skip
        return "\n".join(
            [*lines, f"beside iterations, a request takes {self.overhead_s * 1e3:.1f} ms; not in the profile"]
        )


def measured(profile: Profile) -> dict[str, Any]:
    """A profile as node.yaml has it, its times rounded to five digits."""
    values = {name: getattr(profile, name) for name in MeasuredProfile.__struct_fields__}
    rounded = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in values.items()}
    return rounded | {"batch_s": [float(f"{each:.3g}") for each in profile.batch_s]}


def decode_loads(limits: Limits, tokens: int) -> list[tuple[int, int, bool]]:
    """Streams at once, context of each, and whether it is held out: a grid within the limits, every second held out."""
    most = max(2, limits.max_num_seqs)
    counts = sorted({1, *(n for n in (2, 4, 8, 16, 32, 64, 128, 256) if n < most), most})
    loads = []
    for row, count in enumerate(counts):
        longest = min(limits.max_model_len, limits.kv_tokens // count) - MARGIN * tokens - 32
        if longest < 32:
            break
        contexts = sorted({32, max(32, longest // 4), max(32, longest // 2)})
        loads += [(count, each, (row + column) % 2 == 1) for column, each in enumerate(contexts)]
    return loads


def prefill_loads(limits: Limits, max_batched_tokens: int) -> list[tuple[int, bool]]:
    """Lengths of prompts, and whether it is held out: from a few tokens to one iteration's, every third held out."""
    longest = min(limits.max_model_len - 64, max_batched_tokens, CHUNK_TOKENS)
    lengths = sorted({max(4, round(8 * (longest * 0.9 / 8) ** (k / 12))) for k in range(13)})
    return [(each, k % 3 == 1) for k, each in enumerate(lengths)]


def cached_loads(limits: Limits, max_batched_tokens: int) -> list[tuple[int, int, bool]]:
    """Tokens that are cached of a prompt, those that follow, and whether it is held out: every second is."""
    longest = limits.max_model_len - 64
    most = min(longest // 4, max_batched_tokens // 2, CHUNK_TOKENS // 2)
    grid = [(cached, prompt) for cached in (longest // 4, longest // 2) for prompt in (max(16, most // 4), most)]
    return [(*load, k in (1, 2)) for k, load in enumerate(grid)]


async def calibrate(url: str, settings: Settings, say: Say = lambda line: None) -> Calibration:
    """Measure the engine at `url`, which should have nothing else to do. Raises CalibrationError."""
    async with connected(settings) as session:
        url = engine_base(url)
        model, max_model_len = await find_model(session, url, settings.model)
        prober = Prober(url, model, settings, session)
        busy = []
        try:
            for each in settings.beside:
                named, _ = await find_model(session, engine_base(each), None)
                neighbour = Prober(engine_base(each), named, settings, session)
                busy.append(asyncio.create_task(neighbour.load(settings.beside_requests, 256)))
            measuring = asyncio.create_task(_measure(prober, max_model_len, say))
            await asyncio.wait({measuring, *busy}, return_when=asyncio.FIRST_COMPLETED)
            for task in busy:
                if task.done():
                    measuring.cancel()
                    task.result()
            return await measuring
        except ExceptionGroup as group:
            raise CalibrationError(str(group.exceptions[0])) from None
        finally:
            for task in busy:
                task.cancel()
            await asyncio.gather(*busy, return_exceptions=True)


class Measurement:
    """An engine that is measured in turns, each of which measures every load once."""

    def __init__(self, prober: Prober, limits: Limits, max_model_len: int, say: Say = lambda line: None) -> None:
        self.prober, self.limits, self.max_model_len, self.say = prober, limits, max_model_len, say
        self.alone = prefill_loads(limits, prober.settings.max_batched_tokens)
        self.together = decode_loads(limits, prober.settings.tokens)
        self.after = cached_loads(limits, prober.settings.max_batched_tokens)
        self.prefills: list[list[Sample]] = [[] for _ in self.alone]
        self.cached: list[list[Sample]] = [[] for _ in self.after]
        self.decodes: list[list[Sample]] = [[] for _ in self.together]
        self.joining: list[list[Sample]] = [[] for _ in self.together]

    @classmethod
    async def begin(cls, prober: Prober, max_model_len: int, say: Say = lambda line: None) -> "Measurement":
        """Find the engine's limits. Raises CalibrationError."""
        settings, url = prober.settings, prober.url
        kv_tokens = settings.kv_tokens or kv_tokens_of(await get(prober.session, f"{url}/metrics"), url)
        await prober.learn_words()
        max_num_seqs = settings.max_num_seqs or await find_max_num_seqs(prober, max_model_len)
        limits = Limits(kv_tokens, max_num_seqs, min(max_model_len, settings.longest or max_model_len))
        say(f"{prober.model}: {kv_tokens} KV tokens, {max_num_seqs} requests at once, length {max_model_len}")
        return cls(prober, limits, max_model_len, say)

    async def turn(self) -> None:
        """Measure every load. Raises CalibrationError."""
        await self.settle()
        for k, (prompt, _) in enumerate(self.alone):
            spent_s, times = 0.0, 0
            while times < MOST_ALONE and spent_s < ALONE_S:
                self.prefills[k].append(await self.prober.prefill(prompt))
                spent_s, times = spent_s + self.prefills[k][-1].time_s, times + 1
        for k, (cached, prompt, _) in enumerate(self.after):
            self.cached[k].append(await self.prober.prefill(prompt, cached))
        self.say(f"{len(self.alone) + len(self.after)} prompts alone are measured")
        for k, (decoding, context, _) in enumerate(self.together):
            decode, join = await self.decode(decoding, context)
            self.decodes[k].append(decode)
            self.joining[k].append(join)
            self.say(f"{decoding} at once, {decode.kv_tokens:.0f} KV tokens: {decode.time_s * 1e3:.2f} ms an iteration")

    async def settle(self) -> None:
        """Until the engine has nothing to do. Raises CalibrationError."""
        await settle(self.prober)

    async def decode(self, decoding: int, context: int) -> tuple[Sample, Sample]:
        """As `Prober.decode`, again where the times are none. Raises CalibrationError where they stay so."""
        for _ in range(TRIES):
            found = await self.prober.decode(decoding, context)
            timed = [sample for sample in found if sample.decoding]  # nobody is joined by a stream alone
            if all(math.isfinite(sample.time_s) and sample.time_s > 0 for sample in timed):
                return found
        times = ", ".join(f"{sample.time_s * 1e3:.2f} ms" for sample in timed)
        raise CalibrationError(
            f"{self.prober.url}: {decoding} at once, contexts of {context} tokens, took {times} an iteration, {TRIES} "
            "times: its tokens do not come one by one, or it has something else to do. Leave it and this machine alone "
            "and measure again, near the engine, with a larger --tokens"
        )

    def found(self) -> Calibration:
        """What the turns so far, of which there is one at least, show.

        Raises CalibrationError, also where loads that were held out are `MOST_ERROR` off the fit to the others.
        """
        settings, prober = self.prober.settings, self.prober
        samples = [_median(taken, held_out) for taken, (_, held_out) in zip(self.prefills, self.alone, strict=True)]
        begun = list(zip(self.cached, self.after, strict=True))
        if all(sample.cached >= 0.5 * cached for taken, (cached, _, _) in begun for sample in taken):
            samples += [_median(taken, held_out) for taken, (_, _, held_out) in begun]
        else:
            self.say(
                "prompts that are cached in part are not measured: the engine does not say that it has them cached"
            )
        samples += [
            _median(taken, held_out) for taken, (_, _, held_out) in zip(self.decodes, self.together, strict=True)
        ]
        # Prompts that join others, where both fit into an iteration; every third is held out.
        fitting = [
            taken
            for taken in self.joining
            if 0 < taken[0].decoding <= settings.max_batched_tokens - taken[0].prefill_tokens
        ]
        samples += [_median(taken, k % 3 == 1) for k, taken in enumerate(fitting)]
        checked = errors(fit(samples), samples)
        off = {
            kind: error for kind, error in checked.items()
            if kind.endswith("held out") and not kind.startswith(AFTER_CACHED) and not error.mean <= MOST_ERROR
        }  # fmt: skip
        if off:
            shown = "; ".join(
                f"{kind}: mean {e.mean:.0%}, p90 {e.p90:.0%} of {e.loads} loads" for kind, e in off.items()
            )
            raise CalibrationError(
                f"{prober.url}: what was measured cannot be relied on: the fit is more than {MOST_ERROR:.0%} off the "
                f"loads that it was not made of ({shown}). Let nothing else use the engine or its machine and measure "
                "again, with more --repeats or a larger --tokens; check --max-batched-tokens"
            )
        found = fit([sample._replace(held_out=False) for sample in samples])
        profile = Profile(
            *found.coefficients, self.limits.kv_tokens // BLOCK_TOKENS, self.limits.max_num_seqs,
            settings.max_batched_tokens, self.max_model_len, f"measured: {prober.model}, {len(samples)} loads",
            found.seq_tokens, found.per_pair_s, found.batch_s,
        )  # fmt: skip
        return Calibration(prober.url, prober.model, profile, found.overhead_s, checked, samples)


async def _measure(prober: Prober, max_model_len: int, say: Say) -> Calibration:
    measurement = await Measurement.begin(prober, max_model_len, say)
    for turn in range(prober.settings.repeats):
        say(f"turn {turn + 1} of {prober.settings.repeats}")
        await measurement.turn()
    return measurement.found()


def _median(taken: Sequence[Sample], held_out: bool) -> Sample:
    """One sample of several of the same load: its mean, and the median of its time."""
    return Sample(
        taken[0].decoding,
        statistics.mean(sample.kv_tokens for sample in taken),
        statistics.mean(sample.prefill_tokens for sample in taken),
        statistics.median(sample.time_s for sample in taken),
        held_out,
        statistics.mean(sample.cached for sample in taken),
    )
