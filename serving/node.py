"""A node, from its configuration to a server that answers."""

import asyncio
import gc
import json
import logging
import signal
import ssl
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import uvloop

from wwwserve.agents.kernel import leave_blas_out
from wwwserve.agents.policy.bundle import SHIPPED, folder_of
from wwwserve.agents.policy.bundle import load as load_bundle
from wwwserve.agents.rules import RULES, Policy, Rule
from wwwserve.serving import boundary, overview
from wwwserve.serving.config import ADMIN_CONNECTIONS, ConfigError, LimitsConfig, NodeConfig, StaticConfig
from wwwserve.serving.dispatcher import Dispatcher
from wwwserve.serving.engine.adapter import Engine, EngineError
from wwwserve.serving.fallback import WithFallback
from wwwserve.serving.http.addresses import listen, netloc
from wwwserve.serving.http.certificates import server_context
from wwwserve.serving.http.files import fitting, raise_limit
from wwwserve.serving.http.keys import Identity
from wwwserve.serving.http.messages import Messages, Refusals
from wwwserve.serving.http.pages import Admin
from wwwserve.serving.http.routes import App
from wwwserve.serving.http.server import server_of
from wwwserve.serving.http.transport import AiohttpTransport, Transport
from wwwserve.serving.http.upstream import DirectTransport
from wwwserve.serving.ledger.accounts import slack_ms
from wwwserve.serving.ledger.channel_ledger import ChannelLedger, micro
from wwwserve.serving.ledger.genesis import agreed
from wwwserve.serving.ledger.journal import SqliteJournal
from wwwserve.serving.ledger.warm_up import warm_up as ledger_warm_up
from wwwserve.serving.membership.heartbeat import Membership, StaticMembership
from wwwserve.serving.membership.zenoh import ZenohMembership, open_session
from wwwserve.serving.metrics import Metrics
from wwwserve.serving.node_provider import NodeProvider
from wwwserve.serving.tracing import Tracing, check_installed

log = logging.getLogger("wwwserve.node")

ENDING = (signal.SIGINT, signal.SIGTERM)

_PLAIN = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """A log record as one line of JSON: time, level, logger, message, and what was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        line: dict[str, Any] = {
            "at": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name,
            "message": record.getMessage(),
        }  # fmt: skip
        line |= {key: value for key, value in record.__dict__.items() if key not in _PLAIN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def policy_of(named: str | None) -> Policy:
    """A rule or a shipped policy by its name, a bundle by its folder, or the default; with a rule to fall back on.

    A shipped policy has the name that it is shipped under. Raises agents.policy.bundle.BundleError for a bundle that
    cannot be used.
    """
    if named in RULES:
        return WithFallback(Rule(named))
    folder = folder_of(named)
    policy = WithFallback(load_bundle(folder))
    policy.name = next((name for name, shipped in SHIPPED.items() if shipped == folder), policy.name)
    return policy


def provider_of(config: NodeConfig, policy: Policy) -> NodeProvider:
    """The provider of a configuration, new. Raises ValueError for what cannot be."""
    return NodeProvider(
        policy, config.engine_profile(), config.agreed(), seed=config.seed, credit=config.credit, stake=config.stake,
        mean_prompt=config.prompt_tokens, mean_uncached=config.uncached_tokens, mean_output=config.mean_output,
        compute_per_ktok=config.compute_cost_per_ktok, engines=len(config.engine.urls),
    )  # fmt: skip


def warm_up(config: NodeConfig, policy: Policy) -> None:
    """Have all compiled that a node runs."""
    leave_blas_out()
    provider_of(config, policy).warm_up()
    boundary.warm_up()
    overview.warm_up()
    if config.ledger is not None:
        ledger_warm_up()


def compiled(config: NodeConfig) -> Policy:
    """The policy of a node, of which all is compiled that it runs: that takes a minute the first time, then 5 ms.

    Raises as `serve`, for what can be told before that minute: a key, a port that is taken, tracing without its extra.
    """
    Identity.load(Path(config.key))
    listen(config.host, config.port).close()
    if config.tracing is not None:
        check_installed()
    policy = policy_of(config.policy)
    warm_up(config, policy)
    return policy


def membership_of(
    config: NodeConfig, identity: Identity, transport: Transport, stack: AsyncExitStack, refusals: Refusals,
    wall_clock: Callable[[], float], configured: Iterable[str] = (),
) -> Membership:  # fmt: skip
    """The membership of a configuration, until `stack` is closed; `configured`: other keys that this or a genesis has.
    Raises OSError if it cannot be opened, ConfigError for a list of peers that has the node itself."""
    settings, clock = config.membership, asyncio.get_running_loop().time
    if isinstance(settings, StaticConfig):
        peers = {peer.key: peer.url for peer in config.peers}
        if identity.name in peers:
            raise ConfigError(f"peers must be others, got {identity.name}, which is the key of this node")
        return StaticMembership(peers, identity, transport, clock, wall_clock)
    zenoh = stack.enter_context(open_session(settings))
    return ZenohMembership(identity, settings.network, zenoh, clock, refusals, wall_clock, configured)


def ledger_of(
    config: NodeConfig, identity: Identity, payment: int, stack: AsyncExitStack, wall_clock: Callable[[], float]
) -> ChannelLedger | None:
    """The ledger that is configured, until `stack` is closed. Raises ConfigError, JournalError, LedgerError."""
    settings = config.ledger
    if settings is None:
        return None
    granted = agreed(settings, identity.name)
    journal = SqliteJournal(Path(settings.file), identity.name)
    ledger = ChannelLedger(
        identity,
        journal,
        granted.grants,
        granted.funds,
        earlier=granted.earlier,
        exposure=micro(settings.exposure),
        payment=payment,
        slack_ms=slack_ms(config.market.rtt_s, config.market.speed),
        agreed=settings.genesis is not None,
        closed=settings.closed,
        close_after_s=settings.close_after_s,
        wall_clock=wall_clock,
    )
    stack.callback(ledger.close)
    return ledger


def tls_of(config: NodeConfig, identity: Identity) -> ssl.SSLContext | None:
    """What the data plane's server has for TLS. Raises OSError for files that cannot be used."""
    if config.tls is None:
        return None
    files = (Path(each) if each is not None else None for each in (config.tls.certificate, config.tls.key))
    return server_context(identity, *files)


async def admin_of(config: NodeConfig, app: Admin, stack: AsyncExitStack) -> str | None:
    """Open the listener for the operator, if there is one, until `stack` is closed; returns its URL. Raises OSError."""
    if config.admin is None:
        return None
    listener = stack.enter_context(listen(config.admin.host, config.admin.port, "admin.port"))
    server = server_of(app, LimitsConfig(connections=ADMIN_CONNECTIONS))
    serving = asyncio.create_task(server.serve(sockets=[listener]))

    async def end() -> None:
        server.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)

    stack.push_async_callback(end)
    return f"http://{netloc(config.admin.host, listener.getsockname()[1])}"


async def serve(
    config: NodeConfig, ready: Callable[[str, str], None], wall_clock: Callable[[], float] = time.time,
    stop: asyncio.Event | None = None,
) -> None:  # fmt: skip
    """Run a node until it is cancelled, or `stop` is set and what it has begun has ended; `ready` is called with its
    public key and its URL once it listens.

    Raises ValueError for a configuration or a key that cannot be, OSError for an address that cannot be used.
    """
    policy = compiled(config)
    identity = Identity.load(Path(config.key))
    profile = config.engine_profile()
    provider = provider_of(config, policy)
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(listen(config.host, config.port))
        url = config.url_at(listener.getsockname()[1])
        direct, peers = DirectTransport(), AiohttpTransport(identity=None if config.tls is None else identity)
        stack.callback(direct.close)
        stack.push_async_callback(peers.close)
        metrics = Metrics(config.class_names)
        refusals = Refusals(metrics.message_refused, asyncio.get_running_loop().time)
        ledger = ledger_of(config, identity, provider.market.payment, stack, wall_clock)
        known = (*(ledger.grants if ledger is not None else ()), *(config.trust or ()))
        membership = membership_of(config, identity, peers, stack, refusals, wall_clock, known)
        messages = Messages(identity, membership.knows, wall_clock)
        settings = config.engine
        engines = [
            Engine(settings.kind, each, profile, direct, key=settings.key, timeout_s=settings.timeout_s)
            for each in settings.urls
        ]
        tracing = Tracing(config.tracing, config.name, identity.name) if config.tracing is not None else None
        if tracing is not None:
            stack.push_async_callback(tracing.close)
        dispatcher = Dispatcher(config, provider, engines, membership, messages, peers, metrics, url, ledger, tracing)
        if isinstance(membership, ZenohMembership):
            membership.forgotten, membership.reached_by = dispatcher.forget, url
            membership.only_tls = config.tls is not None
        app = App(dispatcher, config, refusals)
        server = server_of(app, config.limits, tls_of(config, identity))
        admin = await admin_of(config, Admin(app.pages, config.admin.key if config.admin else None), stack)
        try:
            await dispatcher.engine.scrape()
            await dispatcher.list_models()
        except EngineError as error:
            log.warning("the engine is not there yet", extra={"reason": str(error)})
        acting = asyncio.create_task(dispatcher.run())
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        watching = asyncio.create_task(app.pages.history.run())
        told = asyncio.create_task((stop or asyncio.Event()).wait())
        try:
            while not server.started and not serving.done():
                await asyncio.sleep(0.005)
            log.info(
                "ready",
                extra={
                    "key": identity.name, "url": url, "admin": admin, "policy": policy.name,
                    "serves": dispatcher.serves,
                },
            )  # fmt: skip
            ready(identity.name, url)
            await asyncio.wait({serving, acting, told}, return_when=asyncio.FIRST_COMPLETED)
            if told.done():
                log.info("nothing more is taken", extra={"reason": "told to end", "drain_s": config.limits.drain_s})
                dispatcher.leave()
                await app.drain.end(config.limits.drain_s)
                app.pages.console.close()
                server.should_exit = True
            if acting.done():
                app.pages.console.close()
                server.should_exit = True
                acting.result()
            await serving
            log.info("ended")
        finally:
            app.pages.console.close()
            server.should_exit = True
            for task in (acting, told, watching):
                task.cancel()
            await asyncio.gather(acting, serving, told, watching, return_exceptions=True)


def rarely_collect() -> None:
    """What there is now stays, and requests leave little garbage in cycles: to look for it at every 700 objects costs
    more than it finds, and to look through all that was ever imported stops the node for a tenth of a second."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def tell_of_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what nobody handled, but for what uvloop raises where the other side closes a connection on which TLS is just
    spoken: it tells who has the connection as well."""
    error = context.get("exception")
    if isinstance(error, RuntimeError) and str(error).endswith("the handler is closed"):
        log.debug("a connection was closed while it was in use", extra={"reason": str(error)})
    else:
        loop.default_exception_handler(context)


def run(config: NodeConfig) -> None:
    """Run a node until SIGTERM or SIGINT, and then until what it has begun has ended; a second one ends it at once, as
    does the first while it compiles. Prints its URL in a line of JSON when it is ready, logs to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=config.log.upper(), handlers=[handler], force=True)

    def ready(key: str, url: str) -> None:
        print(json.dumps({"name": config.name, "key": key, "url": url}), flush=True)

    async def until_told() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().set_exception_handler(tell_of_error)
        running = asyncio.create_task(serve(config, ready, stop=stop))

        def end() -> None:
            if stop.is_set():
                running.cancel()
            stop.set()

        for number in ENDING:
            asyncio.get_running_loop().add_signal_handler(number, end)
        await asyncio.wait({running})
        if not running.cancelled():
            running.result()

    for number in ENDING:  # ends it at once while it compiles, in which no event loop turns
        signal.signal(number, signal.SIG_DFL)
    files, asked = raise_limit(config.files), config.limits.connections  # what a shell gives is not enough for all
    config = fitting(config)
    if config.limits.connections < asked:
        said = {"files": files, "missing": config.files + 2 * (asked - config.limits.connections) - files}
        log.warning(
            "fewer connections are taken, as more files cannot be open here: see `ulimit -Hn`, LimitNOFILE of systemd",
            extra={"connections": config.limits.connections, "limits.connections": asked, **said},
        )
    compiled(config)
    rarely_collect()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(until_told())
