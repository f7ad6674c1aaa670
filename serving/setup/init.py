"""A node's first files: its key, `node.yaml` and its card. What is missing is asked for on a terminal."""

import asyncio
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import yaml

from wwwserve.agents.arguments import UsageError
from wwwserve.agents.hardware import CHUNK_TOKENS, GPUS, MODELS, profile
from wwwserve.serving import config
from wwwserve.serving.config import ConfigError, NodeConfig
from wwwserve.serving.engine import calibrate
from wwwserve.serving.engine.adapter import EngineError
from wwwserve.serving.engine.fit import CalibrationError
from wwwserve.serving.engine.probe import Settings
from wwwserve.serving.http.addresses import engine_base, host_of, is_free, is_loopback, netloc
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.membership.heartbeat import MOST_LABEL
from wwwserve.serving.setup.card import SUFFIX, Card, card_of, file_name
from wwwserve.serving.setup.look import EngineSeen, catalogue_model, differing, look_at_engine

FIRST_PORT, PORTS = 9000, 100  # where a free one is looked for
ENGINE = "http://127.0.0.1:8000"
ARGUMENTS = "the arguments make no node"
HEAD = (
    "# A wwwserve node: docs/reference/node-yaml.md has every key. `wwwserve join` adds a peer, `wwwserve doctor` "
    "looks it over.\n"
)

Say = Callable[[str], None]
Ask = Callable[[str, str], str]  # a question and its default; returns what is answered


class Wanted(NamedTuple):
    """What is known of a node that is to be; None is not known yet."""

    name: str | None = None
    engine: tuple[str, ...] = ()  # URLs of one, or of several that are alike
    kind: str = "vllm"
    engine_key: str | None = None
    gpu: str | None = None
    model: str | None = None
    max_num_seqs: int = 256
    calibrate: bool = False
    repeats: int = 3
    kv_tokens: int | None = None
    max_batched_tokens: int = CHUNK_TOKENS
    url: str | None = None
    host: str | None = None
    port: int | None = None
    tls: bool = False


class Made(NamedTuple):
    """What was made."""

    key: Path
    key_is_new: bool
    card_file: Path
    card: Card
    config: NodeConfig


def on_terminal(question: str, default: str) -> str:
    """Ask on a terminal. Raises UsageError where it ends."""
    try:
        return input(f"{question} [{default}]: ").strip() or default
    except EOFError:
        raise UsageError("nobody answers; give it as arguments, see --help") from None


def init(file: Path, wanted: Wanted, ask: Ask | None, say: Say) -> Made:
    """Make the files of a node, `file` and two beside it. `ask` is None where nobody can be asked.

    Raises UsageError for what is missing or cannot be, ConfigError where there is such a file, CalibrationError for an
    engine that cannot be measured, IdentityError and OSError for files that cannot be made.
    """
    if file.exists():
        raise ConfigError(f"{file} is there already: edit it, or name another file")
    if not file.parent.is_dir():
        raise ConfigError(f"{file.parent} is no folder")
    wanted, seen = _completed(wanted, ask, say)
    assert wanted.name is not None
    key = file.parent / f"{file_name(wanted.name).removesuffix(SUFFIX)}.pem"
    settings = _settings(wanted, key.name)
    # All but the profile is checked before an engine is measured, for minutes.
    engine = settings["engine"] | {"profile": _profile(wanted, seen, say)}
    try:
        config.parse(settings | {"engine": engine}, ARGUMENTS, file.parent)
    except ConfigError as error:  # of a file that is not there yet
        raise UsageError(str(error)) from None
    if wanted.gpu is None:
        say(f"measuring {wanted.engine[0]}, which takes about {wanted.repeats} minutes")
        if len(wanted.engine) > 1:
            say(f"{', '.join(wanted.engine[1:])} {'is' if len(wanted.engine) == 2 else 'are'} taken to be like it")
        how = Settings(
            key=wanted.engine_key, kind=wanted.kind, repeats=wanted.repeats, kv_tokens=wanted.kv_tokens,
            max_batched_tokens=wanted.max_batched_tokens,
        )  # fmt: skip
        try:
            found = asyncio.run(calibrate.calibrate(wanted.engine[0], how, say))
        except CalibrationError as error:
            raise CalibrationError(
                f"{error}\nNothing was written: try again, or take a known profile by --gpu, see `wwwserve hardware`"
            ) from None
        engine["profile"] = {"kind": "measured", **calibrate.measured(found.profile)}
    settings["engine"] = engine
    made = config.parse(settings, str(file), file.parent)
    key_is_new = not key.exists()
    if key_is_new:
        Identity.generate().save(key)
    identity = Identity.load(key)
    card = card_of(made, identity)
    file.touch(0o600 if wanted.engine_key else 0o666, exist_ok=False)
    file.write_text(_text(settings), encoding="utf-8")
    card_file = file.parent / file_name(wanted.name)
    card_file.write_text(card.text(), encoding="utf-8")
    return Made(key, key_is_new, card_file, card, config.load(file))


def _completed(wanted: Wanted, ask: Ask | None, say: Say) -> tuple[Wanted, EngineSeen | None]:
    """What is wanted with nothing left open, and the engine, if it answers. Raises UsageError."""
    if ask is None:
        given = {"--name": wanted.name is not None, "--engine": bool(wanted.engine)}
        missing = [flag for flag in given if not given[flag]]
        if wanted.gpu is None and not wanted.calibrate:
            missing.append("--calibrate or --gpu")
        if missing:
            raise UsageError(f"needs {', '.join(missing)}: there is no terminal to ask on")
    if wanted.calibrate and wanted.gpu is not None:
        raise UsageError("takes one of --calibrate and --gpu")
    if wanted.name is None and ask is not None:
        wanted = wanted._replace(name=ask("Name of this node, for people", socket.gethostname().partition(".")[0]))
    if not (wanted.name and len(wanted.name) <= MOST_LABEL and wanted.name.isprintable()):
        raise UsageError(f"--name is {wanted.name!r}, expected 1 to {MOST_LABEL} printable characters")
    if not wanted.engine and ask is not None:
        wanted = wanted._replace(engine=(ask("URL of its engine, vLLM or SGLang", ENGINE),))
    for url in wanted.engine:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"--engine is {url!r}, expected http://HOST:PORT")
    wanted = wanted._replace(engine=tuple(map(engine_base, wanted.engine)))
    wanted, seen = _with_profile(wanted, ask, say)
    return _with_address(wanted, ask, say), seen


def _with_profile(wanted: Wanted, ask: Ask | None, say: Say) -> tuple[Wanted, EngineSeen | None]:
    found: dict[str, EngineSeen] = {}
    for url in wanted.engine:
        try:
            found[url] = asyncio.run(look_at_engine(url, wanted.kind, wanted.engine_key))
        except EngineError as error:
            if wanted.calibrate:
                raise UsageError(f"--calibrate needs the engine, which does not answer: {error}") from None
            say(f"the engine does not answer yet: {error}")
            continue
        say(f"the engine at {url} serves {', '.join(found[url].models)}")
        if found[url].unloaded:
            say(f"its load is not known, {found[url].unloaded}: start it with --enable-metrics, if it is SGLang")
    if odd := differing(found):
        raise UsageError(f"engines of one node have to be different ones that are alike: {odd}")
    seen = next(iter(found.values()), None)
    if wanted.gpu is None and not wanted.calibrate and ask is not None:
        if seen is not None and _yes(ask("Measure it now, for about three minutes? It should be idle", "yes")):
            return wanted._replace(calibrate=True), seen
        say(f"GPUs whose profiles are known: {', '.join(GPUS)}")
        wanted = wanted._replace(gpu=ask("GPU of the engine", next(iter(GPUS))))
        if wanted.model is None:
            served = [catalogue_model(each) for each in (seen.models if seen else ())]
            known = next((each for each in served if each is not None), next(iter(MODELS)))
            wanted = wanted._replace(model=ask(f"Its model, of {', '.join(MODELS)}", known))
    return wanted, seen


def _yes(said: str) -> bool:
    return said.lower() in ("y", "yes")


def _with_address(wanted: Wanted, ask: Ask | None, say: Say) -> Wanted:
    url, host, port = wanted.url, wanted.host, wanted.port
    if url is None and ask is not None:
        said = ask("Address at which peers reach this machine, or `local`", _outward())
        url = None if said == "local" else said
    if host is None:
        reached = host_of(_whole(url, FIRST_PORT, wanted.tls)) if url is not None else "localhost"
        inside, outside = ("::1", "::") if ":" in reached else ("127.0.0.1", "0.0.0.0")
        host = inside if is_loopback(reached) else outside
    if port is None:
        port = next((each for each in range(FIRST_PORT, FIRST_PORT + PORTS) if is_free(host, each)), FIRST_PORT)
        if port != FIRST_PORT:
            say(f"port {FIRST_PORT} is in use, this node gets {port}")
    elif not 0 < port < 65536:
        raise UsageError(f"--port is {port}, expected 1 to 65535")
    elif not is_free(host, port):
        raise UsageError(f"--port is {port}, which is in use at {host}: end what uses it, or choose another")
    if url is not None:
        url = _whole(url, port, wanted.tls)
        if wanted.tls and not url.startswith("https://"):
            raise UsageError(f"--url is {url}, expected https:// with --tls")
    return wanted._replace(host=host, port=port, url=url)


def _whole(address: str, port: int, tls: bool) -> str:
    """A URL of what may be a host alone, or one with a port."""
    if "://" in address:
        return address.rstrip("/")
    scheme = "https" if tls else "http"
    if address.count(":") > 1 and not address.startswith("["):  # an IPv6 address alone
        return f"{scheme}://{netloc(address, port)}"
    try:
        given = urlsplit(f"//{address}")
        at = address if given.port is not None else netloc(given.hostname or "", port)
    except ValueError as error:
        raise UsageError(f"--url is {address!r}, expected an address or http://HOST:PORT: {error}") from None
    return f"{scheme}://{at}"


def _outward() -> str:
    """The address of this machine that others would see, as far as it knows itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect(("192.0.2.1", 9))  # for documentation; nothing is sent
            return str(s.getsockname()[0])
        except OSError:
            return "local"


def _profile(wanted: Wanted, seen: EngineSeen | None, say: Say) -> dict[str, Any]:
    """A profile of the catalogue, of which is said if the engine serves none such; where the engine is to be measured,
    any, to check the rest. Raises UsageError."""
    if wanted.gpu is None:
        return {"kind": "catalogue", "gpu": "h100", "model": "qwen3-0.6b", "max_num_seqs": wanted.max_num_seqs}
    served = list(seen.models) if seen is not None else []
    model = wanted.model or next((each for each in map(catalogue_model, served) if each is not None), None)
    if model is None:
        raise UsageError(
            f"--model is needed with --gpu, one of {', '.join(MODELS)}: "
            + (f"none of them is what the engine serves, {', '.join(served)}" if served else "the engine does not say")
        )
    try:
        profile(wanted.gpu, model, wanted.max_num_seqs)
    except ValueError as error:
        raise UsageError(str(error)) from None
    known = [each for each in map(catalogue_model, served) if each is not None]
    if known and model not in known:
        say(
            f"the profile is of {model}, and the engine serves {', '.join(served)}: what the node expects of it will be"
        )
        say(f"wrong. Take --model {known[0]}, or measure the engine by --calibrate")
    return {"kind": "catalogue", "gpu": wanted.gpu, "model": model, "max_num_seqs": wanted.max_num_seqs}


def _settings(wanted: Wanted, key: str) -> dict[str, Any]:
    """`node.yaml` but for the engine's profile."""
    engine: dict[str, Any] = {"url": wanted.engine[0] if len(wanted.engine) == 1 else [*wanted.engine]}
    engine |= {"kind": wanted.kind} if wanted.kind != "vllm" else {}
    engine |= {"key": wanted.engine_key} if wanted.engine_key else {}
    settings: dict[str, Any] = {"name": wanted.name, "key": key}
    settings |= {"host": wanted.host} if wanted.host != "127.0.0.1" else {}
    settings["port"] = wanted.port
    settings |= {"url": wanted.url} if wanted.url else {}
    settings |= {"tls": {}} if wanted.tls else {}
    return settings | {"engine": engine}


def _text(settings: dict[str, Any]) -> str:
    return HEAD + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120)


def is_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
