"""What comes from outside, before anything is done with it: its size, its types, its one spelling.

Bodies of JSON, requests of users and peers, headers between nodes, and the line before a peer's answer are read here,
and what is not as it should be is refused with the reason. A `BoundaryError` says it.
"""

import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
import orjson
from msgspec import Meta
from numpy.typing import NDArray

from wwwserve.agents.kernel import kernel
from wwwserve.agents.protocol import TARIFF_SIZE
from wwwserve.serving.market import MOST_PRICE, Promise, Tariff

SCANNED_BYTES = 1 << 16  # of JSON, from which on its values are counted before it is read
MOST_WEIGHT = 300_000  # of the values of one body: 1 for each, and 8 more for each list, object and key; 20 ms
MOST_PROMPT = 1 << 24  # tokens that a peer may say a prompt has
MOST_PROMISED_S = 1e6
MOST_URL = 512  # characters
MOST_CHOICES = 128  # for one prompt; between nodes, for all prompts of a request
MOST_LOGPROBS = 20  # alternatives of a token

ModelName = Annotated[str, Meta(pattern=r"\A[ -~]{1,256}\Z")]
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]  # SHA-256

_URL = re.compile(r"https?://(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?(?:/[A-Za-z0-9_.~-]+)*/?")
_SECONDS = re.compile(r"[0-9]{1,16}(?:\.[0-9]{1,16})?(?:e[+-][0-9]{1,3})?")
_KIND = re.compile(r"(?:application/json|text/event-stream|text/plain)(?:; ?[a-z]{1,20}=[A-Za-z0-9_-]{1,40})?")

# What a request may say that goes from one node to another: how to sample and what to answer. All else that an engine
# takes stays between it and its operator's users: priorities, files and addresses to load from, code to be run.
SETTINGS = frozenset((
    "model", "messages", "prompt", "suffix", "stream", "stream_options", "n", "user", "metadata", "store",
    "max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "length_penalty", "seed", "stop", "stop_token_ids",
    "bad_words", "logit_bias", "logprobs", "top_logprobs", "prompt_logprobs", "echo", "ignore_eos",
    "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens", "tools", "tool_choice",
    "parallel_tool_calls", "functions", "function_call", "response_format", "reasoning_effort", "include_reasoning",
    "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "cache_salt", "add_special_tokens",
    "allowed_token_ids", "return_token_ids", "return_tokens_as_token_ids", "verbosity", "service_tier",
    "prompt_cache_key", "safety_identifier",
))  # fmt: skip
FORMATS = ("text", "json_object", "json_schema")  # of an answer
COUNTED = ("logprobs", "top_logprobs", "prompt_logprobs")
MEDIA = {"image_url": "data:image/", "audio_url": "data:audio/", "video_url": "data:video/"}  # by kinds of parts


class BoundaryError(ValueError):
    """Something from outside that is not taken; the message says why."""


# JSON.


@kernel
def _weight(text: NDArray[np.uint8]) -> int:
    """Of the values in some JSON: what it costs to make them, more or less."""
    weight, inside, skip = 0, False, False
    for c in text:
        if skip:
            skip = False
        elif inside:
            if c == 0x5C:  # a backslash
                skip = True
            elif c == 0x22:  # a quotation mark
                inside = False
        elif c == 0x22:
            inside = True
        elif c == 0x2C:  # a comma
            weight += 1
        elif c == 0x5B or c == 0x7B or c == 0x3A:  # a bracket, a brace or a colon
            weight += 8
    return weight


def loads(body: bytes) -> Any:
    """What JSON says. Raises BoundaryError, also for so many values that a node would stand still while it reads."""
    if len(body) > SCANNED_BYTES and _weight(np.frombuffer(body, np.uint8)) > MOST_WEIGHT:
        raise BoundaryError("it has too many values")
    try:
        return orjson.loads(body)
    except ValueError as error:
        raise BoundaryError(f"it is not JSON: {error}") from None


def object_of(body: bytes) -> dict[str, Any]:
    """The object that a body is. Raises BoundaryError."""
    try:
        found = loads(body)
    except BoundaryError as error:
        raise BoundaryError(f"the body cannot be read: {error}") from None
    if not isinstance(found, dict):
        said = "null" if found is None else f"a {type(found).__name__}"
        raise BoundaryError(f"the body is {said}, expected an object")
    return found


class _Choice(msgspec.Struct):
    message: msgspec.Raw = msgspec.Raw(b"null")
    text: msgspec.Raw = msgspec.Raw(b"null")
    index: msgspec.Raw = msgspec.Raw(b"0")


class _Answer(msgspec.Struct):
    usage: msgspec.Raw = msgspec.Raw(b"null")
    choices: Annotated[list[_Choice], Meta(max_length=MOST_CHOICES**2)] = []


def answer_of(body: bytes) -> dict[str, Any]:
    """What an answer that is not streamed says of its text and its tokens; log-probabilities, which may be many times
    the rest, are left out where there are many. Raises BoundaryError."""
    try:
        return object_of(body)
    except BoundaryError:
        answer = read(body, _Answer)
        parts = [answer.usage, *(part for each in answer.choices for part in msgspec.structs.astuple(each))]
        if sum(_weight(np.frombuffer(part, np.uint8)) for part in parts) > MOST_WEIGHT:
            raise
        choices = [
            {name: loads(bytes(part)) for name, part in msgspec.structs.asdict(each).items()} for each in answer.choices
        ]
        return {"usage": loads(bytes(answer.usage)), "choices": choices}


def read(content: bytes | str, kind: Any) -> Any:
    """What is of a type, or of one of several, from JSON. Raises BoundaryError."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BoundaryError(str(error)) from None


def warm_up() -> None:
    """Compile what would be at the first large body."""
    _weight(np.frombuffer(b"[]", np.uint8))


# Requests.


def prompt_size(request: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of the texts that a model reads, as far as they can be seen, and tokens that it is given as such."""
    prompt, messages = request.get("prompt"), request.get("messages")
    if isinstance(prompt, str):
        return len(prompt.encode(errors="replace")), 0
    if isinstance(prompt, list):  # of tokens, or of texts or lists of tokens, each a prompt
        if set(map(type, prompt)) <= {int}:
            return 0, len(prompt)
        texts = sum(len(each.encode(errors="replace")) for each in prompt if isinstance(each, str))
        return texts, sum(len(each) if isinstance(each, list) else 1 for each in prompt if not isinstance(each, str))
    if not isinstance(messages, list):
        return 0, 0
    size = 0
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            size += len(text.encode(errors="replace")) if isinstance(text, str) else 0
    return size, 0


def check_shareable(request: Mapping[str, Any]) -> None:
    """Raises BoundaryError for a request that is not to be run for another node: an engine would do more for it than
    read a prompt and answer."""
    other = {name for name, said in request.items() if said is not None} - SETTINGS
    if other:
        raise BoundaryError(f"{min(other)[:80]!r} is no setting of requests between nodes")
    for name in COUNTED:
        count = request.get(name)
        if not (count is None or isinstance(count, bool) or (type(count) is int and 0 <= count <= MOST_LOGPROBS)):
            raise BoundaryError(f"{name} is not true, false, or 0 to {MOST_LOGPROBS}")
    template = request.get("chat_template_kwargs") or {}
    if not (isinstance(template, dict) and all(isinstance(value, bool) for value in template.values())):
        raise BoundaryError("chat_template_kwargs says more than true and false")
    wanted = request.get("response_format") or {"type": "text"}
    if not (isinstance(wanted, dict) and wanted.get("type") in FORMATS):
        raise BoundaryError(f"response_format is none of {', '.join(FORMATS)}")
    prompt, messages = request.get("prompt"), request.get("messages")
    if isinstance(prompt, list) and len(prompt) > MOST_CHOICES and not isinstance(prompt[0], int):
        raise BoundaryError(f"it has more than {MOST_CHOICES} prompts")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if not _is_plain(part):
                raise BoundaryError("a part of its messages is no text, and nothing that it brings along")


def _is_plain(part: Any) -> bool:
    """Whether a part of a message is all there is to it, with nothing for the engine to fetch."""
    if not isinstance(part, dict):
        return isinstance(part, str)
    kind = part.get("type")
    if kind in ("text", "refusal"):
        return part.keys() <= {"type", "text", "refusal"} and all(isinstance(each, str) for each in part.values())
    if kind == "input_audio":
        return part.keys() == {"type", "input_audio"}
    medium = part.get(kind) if isinstance(kind, str) and kind in MEDIA and part.keys() == {"type", kind} else None
    url = medium.get("url") if isinstance(medium, dict) and medium.keys() <= {"url", "detail"} else None
    return isinstance(url, str) and url.startswith(MEDIA[str(kind)])


# Headers.


def prompt_tokens(header: bytes, least: int) -> int:
    """Tokens of a peer's prompt as it says. Raises BoundaryError for fewer than `least`, which it has at least."""
    if not (header.isdigit() and len(header) < 10 and max(1, least) <= int(header) < MOST_PROMPT):
        raise BoundaryError(f"expected {max(1, least)} tokens or more")
    return int(header)


def tariff_of(header: bytes) -> Tariff:
    """The tariff that a peer goes by. Raises BoundaryError."""
    prices = header.split()
    if len(prices) != TARIFF_SIZE or not all(p.isdigit() and len(p) < 11 and int(p) <= MOST_PRICE for p in prices):
        raise BoundaryError(f"expected {TARIFF_SIZE} prices in micro-credits")
    given, cached, output = map(int, prices)
    return given, cached, output


def promise_of(ttft: str, tpot: str) -> Promise:
    """What a peer promises. Raises BoundaryError."""
    if not (_SECONDS.fullmatch(ttft) and _SECONDS.fullmatch(tpot)):
        raise BoundaryError("a promise is not in seconds")
    promise = Promise(float(ttft), float(tpot))
    if max(promise) > MOST_PROMISED_S:
        raise BoundaryError(f"a promise of {promise.ttft_s} s and {promise.tpot_s} s a token")
    return promise


def head_line(line: bytes) -> tuple[int, str]:
    """Status and type of a peer's answer, which go on to the user. Raises BoundaryError: of another status clients
    would not read the body as its body, and another type they might take for more than data."""
    head = loads(line)
    if not isinstance(head, dict):
        raise BoundaryError("the line before its answer is no object")
    status, kind = head.get("status"), head.get("type")
    if type(status) is not int or not (status == 200 or 400 <= status < 600):
        raise BoundaryError(f"its answer has the status {status!r}")
    if not (isinstance(kind, str) and _KIND.fullmatch(kind)):
        raise BoundaryError(f"its answer has the type {kind!r}")
    return status, kind


def flag_of(header: bytes) -> bool:
    """What a header says that is on or off. Raises BoundaryError."""
    if header.lower() not in (b"", b"0", b"false", b"1", b"true"):
        raise BoundaryError("expected 1 or true, 0 or false")
    return header.lower() in (b"1", b"true")


# Addresses.


def check_url(url: str, by: str = "http://localhost") -> None:
    """Raises BoundaryError for what cannot be the address of a node: one with a user, a query or an anchor, which would
    make another request of what goes there, and the addresses of a machine itself or of its network's services, unless
    the address `by` which it is reached is such a one as well."""
    if len(url) > MOST_URL or not _URL.fullmatch(url) or {"..", "."} & set(url.split("/")):
        raise BoundaryError(f"url is {url[:80]!r}, expected http:// or https://, a host, a port and a path at most")
    host = urlsplit(url).hostname or ""
    if _is_local(host) and not _is_local(urlsplit(by).hostname or ""):
        raise BoundaryError(f"url is {url[:80]!r}, at an address that is another one on every machine")


def _is_local(host: str) -> bool:
    if host.rstrip(".") == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return host.replace(".", "").isdigit() or host.startswith("0x")  # other ways to write an IPv4 address
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped if mapped is not None else address
    return address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast
