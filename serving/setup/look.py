"""What an engine and the own node say of themselves, to their operator."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from wwwserve.agents.hardware import MODELS
from wwwserve.serving.config import NodeConfig
from wwwserve.serving.engine.adapter import MOST_PAGE, NAMES, EngineError, made_at, read_load
from wwwserve.serving.engine.fit import CalibrationError
from wwwserve.serving.engine.probe import kv_tokens_of
from wwwserve.serving.http.addresses import engine_base, here, netloc
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.transport import AiohttpTransport
from wwwserve.serving.local_nodes import NetworkError, look
from wwwserve.serving.plain import in_words

TIMEOUT_S = 5.0
MOST_OFF = 0.1  # relative, of the size of a KV cache


class EngineSeen(NamedTuple):
    """An engine that answers."""

    models: dict[str, int | None]  # what it serves, and the longest request of each, tokens, if it says
    unloaded: str  # why its load is not known; empty where it is
    kv_tokens: int | None  # that its KV cache holds, if it says
    made_at: str = ""  # see `serving.engine.adapter.made_at`


async def look_at_engine(url: str, kind: str = "vllm", key: str | None = None) -> EngineSeen:
    """Ask an engine what it is. Raises EngineError, which says why it cannot be used as it is."""
    url, transport = engine_base(url), AiohttpTransport()
    headers = {"authorization": f"Bearer {key}"} if key else {}

    async def get(path: str) -> bytes:
        try:
            async with transport.request(
                "GET", url + path, headers=headers, timeout_s=TIMEOUT_S, read_timeout_s=TIMEOUT_S
            ) as response:
                page = await response.read(MOST_PAGE)
        except (OSError, TimeoutError) as error:
            raise EngineError(f"{url}{path}: {in_words(error)}") from None
        if response.status == 401:
            raise EngineError(f"{url}{path} answers 401: it wants an API key, `engine.key`")
        if response.status != 200:
            raise EngineError(f"{url}{path} answers {response.status}")
        return page

    try:
        try:
            listed = orjson.loads(await get("/v1/models"))["data"] or []  # null: Ollama has none
            models = {str(each["id"]): each.get("max_model_len") for each in listed}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise EngineError(f"{url}/v1/models lists no models: expected the URL of an engine") from None
        unloaded, kv_tokens, since = "", None, ""
        try:
            page = (await get("/metrics")).decode(errors="replace")
            since = made_at(page)
            read_load(page, NAMES[kind], 1)
            kv_tokens = kv_tokens_of(page, url) if kind == "vllm" else None
        except EngineError as error:
            unloaded = str(error)
        except CalibrationError:  # it does not say how large its cache is
            pass
        return EngineSeen(models, unloaded, kv_tokens, since)
    finally:
        await transport.close()


def differing(seen: Mapping[str, EngineSeen]) -> str:
    """How two of these engines, by their URLs, are not two that are alike, as those of one node have to be; empty where
    all are."""
    first, *others = seen or ("",)
    by_made: dict[str, str] = {}
    for url, each in seen.items():
        same = by_made.setdefault(each.made_at or url, url)
        if same != url:
            return f"{same} and {url} are the same engine"
    for other in others:
        one, two = seen[first], seen[other]
        if set(one.models) != set(two.models):
            return f"{first} serves {', '.join(one.models)}, {other} {', '.join(two.models)}"
        for name in one.models:
            if one.models[name] != two.models[name]:
                return f"{first} takes requests of {one.models[name]} tokens, {other} of {two.models[name]}"
        if None not in (one.kv_tokens, two.kv_tokens) and not _alike(one.kv_tokens or 0, two.kv_tokens or 0):
            return f"{first} has a KV cache of {one.kv_tokens:,} tokens, {other} of {two.kv_tokens:,}"
    return ""


def _alike(one: int, two: int) -> bool:
    return abs(one - two) <= MOST_OFF * max(one, two)


def catalogue_model(served: str) -> str | None:
    """The model of the catalogue that a served name tells of, if any: `Qwen/Qwen3-8B` is `qwen3-8b`."""
    said = _plain(served)
    found = [name for name in MODELS if _plain(name) in said]
    return max(found, key=len, default=None)


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def own_network(config: NodeConfig) -> dict[str, Any]:
    """What the node of a configuration says in `/network`, to who is on its machine and may read its files.

    Raises NetworkError where it does not answer, IdentityError for a key that cannot be used.
    """
    if config.admin is not None:
        return look(f"http://{netloc(here(config.admin.host), config.admin.port)}", config.admin.key)
    at = netloc(here(config.host), config.port)
    if config.tls is None:
        return look(f"http://{at}")
    return asyncio.run(_own_over_tls(f"https://{at}", Identity.load(Path(config.key))))


async def _own_over_tls(url: str, identity: Identity) -> dict[str, Any]:
    """The same of a node that shows no certificate but its own: it has to have the key of this configuration."""
    transport = AiohttpTransport(identity=identity)
    try:
        async with transport.request(
            "GET", f"{url}/network", headers={}, timeout_s=TIMEOUT_S, read_timeout_s=TIMEOUT_S, peer=identity.name
        ) as response:
            body = await response.read(MOST_PAGE)
        seen: dict[str, Any] = orjson.loads(body)
    except (OSError, TimeoutError, ValueError) as error:
        raise NetworkError(f"{url} does not answer as this node: {in_words(error)}") from None
    finally:
        await transport.close()
    if response.status != 200:
        raise NetworkError(f"{url} answers with {response.status}: {seen.get('error', {}).get('message', '')}")
    return seen
