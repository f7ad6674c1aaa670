"""The users of a live network: they send a plan's requests, and say when answers came and what was cached.

`Tokens` asks for completions of made-up tokens, of exactly the lengths and shared prefixes that the plan has. `Talk` is
what most people's programs are, the `openai` client in conversations: a turn has all messages before it, with the
answers as they came.
"""

import re
import time
from typing import Any, NamedTuple, Protocol, Self

import aiohttp
import numpy as np
import orjson

from wwwserve.agents.arguments import UsageError
from wwwserve.agents.classes import CLASS_MAX
from wwwserve.envs.emulator_api import BYTES_PER_TOKEN
from wwwserve.envs.scenario import SessionsTraffic
from wwwserve.envs.state import MarketPlan
from wwwserve.eval.live.networks import Live
from wwwserve.eval.live.prompts import Prompts

_CACHED = re.compile(rb'"cached_tokens":\s*(\d+)')


class Asked(NamedTuple):
    """What became of a request; times by `time.monotonic`."""

    whole: bool
    first_s: float  # when the first of the answer came, of a stream; else its end
    ended_s: float
    cached: int  # tokens of its prompt, as the answer says


class Users(Protocol):
    """Who sends requests."""

    async def ask(self, r: int) -> Asked | None:
        """Send the rth request of the plan; None if the connection broke off."""
        ...


class Lengths:
    """What is said of a request beside its prompt."""

    def __init__(self, planned: MarketPlan, told: bool) -> None:
        """Nodes are `told` the length of an answer, or else only how long it can be."""
        self.planned, self.told = planned, told
        self.classes = [each.name for each in planned.scenario.slo.classes]

    def of(self, r: int) -> dict[str, Any]:
        """Of the rth request."""
        traffic, output = self.planned.traffic, int(self.planned.traffic.output[r])
        if self.told:
            return {"max_tokens": output, "ignore_eos": True}
        longest = int(self.planned.known[traffic.provider[r], traffic.klass[r], CLASS_MAX])
        return {"max_tokens": longest, "min_tokens": output}

    def headers(self, r: int) -> dict[str, str]:
        """Of the rth request."""
        return {"x-slo-class": self.classes[int(self.planned.traffic.klass[r])]} if self.classes else {}


class Tokens:
    """Users who send tokens."""

    def __init__(
        self, network: Live, planned: MarketPlan, session: aiohttp.ClientSession, stream: bool, turn: int, told: bool
    ) -> None:
        """With another `turn`, prompts are other ones of the same lengths. See `Lengths` for `told`."""
        self.network, self.planned, self.session, self.stream = network, planned, session, stream
        self.lengths = Lengths(planned, told)
        self.prompts = Prompts(planned, turn, network.emulated)
        self.options: dict[str, Any] = {}
        self.reads = _has_turns(planned) and not network.emulated  # the tokens of answers, as vLLM tells them
        if stream and _has_turns(planned):
            self.options["stream_options"] = {"include_usage": True}
        if self.reads:
            self.options["return_token_ids"] = True

    async def ask(self, r: int) -> Asked | None:
        """See `Users`."""
        site = self.network.sites[int(self.planned.traffic.provider[r])]
        asked = {"model": site.model, "prompt": self.prompts.tokens(r), "stream": self.stream}
        body = orjson.dumps(asked | self.lengths.of(r) | self.options)
        headers = {"content-type": "application/json"} | self.lengths.headers(r)
        try:
            async with self.session.post(f"{site.url}/v1/completions", data=body, headers=headers) as response:
                last, first_s = b"", 0.0
                async for part in response.content.iter_any():
                    first_s = first_s or time.monotonic()
                    last = last + part if self.reads else (last + part)[-4096:]
                ended_s = time.monotonic()
        except (aiohttp.ClientError, OSError):
            return None
        whole = response.status == 200 and (not self.stream or last.rstrip().endswith(b"data: [DONE]"))
        reported = _CACHED.search(last)
        if self.reads and whole:
            self.prompts.answered(r, _token_ids(last))
        return Asked(whole, first_s if self.stream else ended_s, ended_s, int(reported[1]) if reported else 0)


class Talk:
    """Users who talk by the `openai` client, until the context ends that this is. A token of theirs is four letters, as
    an emulated engine counts them."""

    def __init__(self, network: Live, planned: MarketPlan, stream: bool, turn: int, told: bool) -> None:
        """See `Tokens`. Raises UsageError without that client, for real engines, and for traffic that is no talk."""
        try:
            import openai
        except ImportError:
            raise UsageError("--client openai needs it: pip install openai") from None
        if not network.emulated or planned.shares_prefixes != _talks(planned):
            raise UsageError("--client openai talks to emulated engines, in sessions that are drawn and not recorded")
        self.network, self.planned, self.stream, self.turn = network, planned, stream, turn
        self.lengths, self.errors = Lengths(planned, told), (openai.OpenAIError, OSError)
        self.clients = [
            openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="any", max_retries=0, timeout=None)
            for site in network.sites
        ]
        self._said: dict[int, list[dict[str, str]]] = {}  # by each request, with its answer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self.clients:  # one that is left open closes itself on whichever loop runs when it is collected
            await client.close()

    def _messages(self, r: int) -> list[dict[str, str]]:
        traffic, u = self.planned.traffic, int(self.planned.traffic.follows[r])
        row, tokens = int(traffic.provider[r]), int(traffic.prompt[r])
        said, of = [], self.planned.scenario.providers[row].traffic
        if u >= 0:
            said = self._said.pop(u)
            tokens -= int(traffic.prompt[u] + traffic.output[u])
        elif isinstance(of, SessionsTraffic) and of.system_tokens:
            said = [{"role": "system", "content": f"{self.turn % 10}s{row:02d}" * of.system_tokens}]
            tokens -= of.system_tokens
        own = np.base_repr(self.turn * len(traffic.turn) + r, 36).zfill(BYTES_PER_TOKEN)
        return [*said, {"role": "user", "content": own * tokens}]

    async def ask(self, r: int) -> Asked | None:
        """See `Users`."""
        row = int(self.planned.traffic.provider[r])
        messages, lengths = self._messages(r), self.lengths.of(r)
        most = lengths.pop("max_tokens")
        create: Any = self.clients[row].chat.completions.create
        asked = {
            "model": self.network.sites[row].model, "messages": messages, "max_tokens": most, "extra_body": lengths,
            "extra_headers": self.lengths.headers(r),
        }  # fmt: skip
        text, first_s, usage = "", 0.0, None
        try:
            if self.stream:
                async for event in await create(**asked, stream=True, stream_options={"include_usage": True}):
                    first_s = first_s or time.monotonic()
                    text += "".join(choice.delta.content or "" for choice in event.choices)
                    usage = event.usage or usage
            else:
                whole = await create(**asked)
                text, usage = whole.choices[0].message.content or "", whole.usage
        except self.errors:
            return None
        ended_s = time.monotonic()
        self._said[r] = [*messages, {"role": "assistant", "content": text}]
        details = usage.prompt_tokens_details if usage is not None else None
        cached = (details.cached_tokens if details is not None else None) or 0
        return Asked(usage is not None, first_s or ended_s, ended_s, cached)


def _token_ids(answer: bytes) -> list[int]:
    """Of an answer of one choice, whole or as a stream."""
    events = [line[6:] for line in answer.splitlines() if line.startswith(b"data: {")] or [answer]
    choices = [choice for event in events for choice in orjson.loads(event)["choices"]]
    return [token for choice in choices for token in choice.get("token_ids") or ()]


def _has_turns(planned: MarketPlan) -> bool:
    return bool((planned.traffic.follows >= 0).any())


def _talks(planned: MarketPlan) -> bool:
    """Whether all that requests share is in sessions that are drawn."""
    traffic = [provider.traffic for provider in planned.scenario.providers]
    shares = {int(i) for i in np.unique(planned.traffic.provider[planned.traffic.turn > 1])}
    return bool(shares) and all(isinstance(traffic[i], SessionsTraffic) for i in shares)
