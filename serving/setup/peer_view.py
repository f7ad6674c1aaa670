"""How a peer sees this node: whether it lists it, with its key and url, whether its signature passes, what time it has.

A peer is sent an advert that is signed as all are, and so old that it never counts; what it is refused for tells.
"""

import re
import time
from enum import Enum
from typing import NamedTuple

import orjson

from wwwserve.serving.config import NodeConfig
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.transport import AiohttpTransport, OtherKeyError
from wwwserve.serving.membership.heartbeat import BEAT_PATH, MOST_BYTES, knock
from wwwserve.serving.plain import in_words

TIMEOUT_S = 5.0
_STALE = re.compile(r"signed ([0-9.]+) s before the time here")


class View(Enum):
    """What a peer makes of this node."""

    LISTED = "it lists this node, with its key and url, and takes its signature"
    STRANGER = "it does not list this node"
    MOVED = "it lists this node at another url"
    ITSELF = "it is this node"
    OTHER_KEY = "it has another key than it is listed with"
    OLDER = "it is of an older release, which speaks another protocol"
    UNREACHABLE = "it does not answer"
    ODD = "it does not answer as a node does"


class Answer(NamedTuple):
    """What came of it."""

    view: View
    said: str  # by the peer, or of the connection
    ahead_s: float | None = None  # by how much its clock is, as far as it told


async def ask(config: NodeConfig, identity: Identity, key: str, url: str) -> Answer:
    """How the peer of that key sees this node."""
    body = knock(identity, config.name, config.url_at(config.port))
    transport = AiohttpTransport(identity=identity if config.tls is not None else None)
    start_s = time.time()
    try:
        async with transport.request(
            "POST", url + BEAT_PATH, body=body, headers={"content-type": "application/octet-stream"},
            timeout_s=TIMEOUT_S, read_timeout_s=TIMEOUT_S, peer=key,
        ) as response:  # fmt: skip
            content = await response.read(MOST_BYTES)
    except (OSError, TimeoutError) as error:
        view = View.OTHER_KEY if isinstance(error, OtherKeyError) else View.UNREACHABLE
        return Answer(view, in_words(error))
    finally:
        await transport.close()
    now_s = (start_s + time.time()) / 2
    try:
        refusal = orjson.loads(content)["error"]
        kind, said = str(refusal["type"]), str(refusal["message"])
    except (ValueError, KeyError, TypeError):
        return Answer(View.ODD, f"status {response.status}")
    if kind == "stale":
        told = _STALE.search(said)
        return Answer(View.LISTED, "", float(told[1]) - now_s if told else None)
    if kind == "stranger":
        if "key of this node" in said:
            return Answer(View.ITSELF, said)
        return Answer(View.MOVED if said.startswith("it is at") else View.STRANGER, said)
    if kind == "malformed" and "unknown field `speaks`" in said:  # before adverts said a version
        return Answer(View.OLDER, said)
    return Answer(View.ODD, f"{response.status}, {kind}: {said}")
