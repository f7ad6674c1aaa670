"""An event loop on virtual time, and what runs on it together and dies together.

Time stands still while anything can run and then jumps to the next timer, so an hour in which little happens takes
milliseconds, and the same program takes the same steps every time. There are no threads, no sockets and no waiting.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar

T = TypeVar("T")

WALL_START_S = 1_700_000_000.0  # wall time at virtual time 0, s since 1970
MOST_ROUNDS = 1_000_000  # of callbacks at one instant, beyond which time is said to stand still


class Deadlock(RuntimeError):
    """Nothing can run and no timer is set, but somebody waits."""


class Standstill(RuntimeError):
    """Callbacks go on and on at one instant."""


class _Task(asyncio.Task[T]):
    """A task with the same hash in every run, so that a set of tasks has the same order."""

    _number: int

    def __new__(cls, coro: Any, *, loop: "VirtualLoop", **_: Any) -> "_Task[T]":
        task = super().__new__(cls)
        loop.tasks_made += 1
        task._number = loop.tasks_made
        return task

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.BaseEventLoop):
    """See the module. Timers of one instant go off in the order in which they were set, and what follows from one at
    that instant comes before the next one."""

    _ready: "deque[asyncio.Handle]"  # both of asyncio.BaseEventLoop
    _stopping: bool

    def __init__(self, *, wall_start_s: float = WALL_START_S, executor_s: float = 0.0) -> None:
        """`executor_s`: what a call in an executor takes; it runs, on this thread, when that is over."""
        super().__init__()
        self.wall_start_s, self.executor_s = wall_start_s, executor_s
        self.tasks_made = 0
        self.frozen = 0  # processes
        self._now_s = 0.0
        self._rounds = 0  # at this instant
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timers_set = self._timers_cancelled = 0

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now_s

    def wall_s(self) -> float:
        """Virtual wall time, s since 1970."""
        return self.wall_start_s + self._now_s

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """See `asyncio.loop.call_later`."""
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """See `asyncio.loop.call_at`. A time that is past counts as now."""
        self._check_open()
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._timers_set += 1
        heapq.heappush(self._timers, (max(when, self._now_s), self._timers_set, timer))
        return timer

    def outside(self, delay: float, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        """`call_later` that is no process's, whoever calls: what is on a wire arrives though its sender is frozen."""
        return self.call_later(delay, callback, *args, context=Context())

    async def sleep_until(self, when_s: float) -> None:
        """Wait until exactly that time; `asyncio.sleep` of a difference may end a rounding error off it."""
        future = self.create_future()
        timer = self.call_at(when_s, _wake, future)
        try:
            await future
        finally:
            timer.cancel()

    def create_task(
        self, coro: Generator[Any, None, T] | Coroutine[Any, Any, T], *, name: object = None,
        context: Context | None = None, **_: Any,
    ) -> asyncio.Task[T]:  # fmt: skip
        """See `asyncio.loop.create_task`. The task belongs to the process of its context."""
        self._check_open()
        task: _Task[T] = _Task(coro, loop=self, name=name or f"task {self.tasks_made + 1}", context=context)
        process = _process.get() if context is None else context.get(_process)
        if process is not None:
            process.adopt(task)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> "asyncio.Future[T]":  # type: ignore[override]
        """See `asyncio.loop.run_in_executor`."""
        future: asyncio.Future[T] = self.create_future()
        self.call_later(self.executor_s, _settle, future, func, args)
        return future

    def _check_open(self) -> None:
        if self.is_closed():
            raise RuntimeError("the loop is closed")

    # What asyncio.BaseEventLoop leaves to those that make it whole.

    def _run_once(self) -> None:
        ready = self._ready
        if not ready and not self._stopping:
            timers = self._timers
            while timers and timers[0][2].cancelled():
                heapq.heappop(timers)
                self._timers_cancelled -= 1
            if not timers:
                raise Deadlock(f"at {self._now_s} s nothing is left to happen, but these wait: {self._waiting()}")
            when_s, _, timer = heapq.heappop(timers)
            if when_s > self._now_s:
                self._now_s, self._rounds = when_s, 0
            ready.append(timer)
        self._rounds += 1
        if self._rounds > MOST_ROUNDS:
            raise Standstill(f"time stands still at {self._now_s} s, busy with {ready[0]!r}")
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled or (self.frozen and self._held(handle)):
                continue
            handle._run()

    def _held(self, handle: asyncio.Handle) -> bool:
        """Whether it is of a process that is frozen, and is kept for later."""
        process = handle._context.get(_process)  # type: ignore[attr-defined]
        if process is None or not process.frozen:
            return False
        process.held.append(handle)
        return True

    def again(self, handles: "list[asyncio.Handle]") -> None:
        """Run what was held."""
        self._ready.extend(handles)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self._timers_cancelled += 1  # one that is going off as well, until the heap is swept
        if self._timers_cancelled > 1000 and 2 * self._timers_cancelled > len(self._timers):
            self._timers = [each for each in self._timers if not each[2].cancelled()]
            heapq.heapify(self._timers)
            self._timers_cancelled = 0

    def _waiting(self) -> str:
        names = sorted(f"{task.get_name()} ({task.get_coro()!r})" for task in asyncio.all_tasks(self))
        return "; ".join(names[:10]) or "nobody"

    def _write_to_self(self) -> None:
        """Nobody has to be woken up."""

    def _process_events(self, event_list: object) -> None:
        """There are none."""


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _settle(future: "asyncio.Future[T]", func: Callable[..., T], args: tuple[Any, ...]) -> None:
    try:
        result = func(*args)
    except Exception as error:
        if not future.cancelled():
            future.set_exception(error)
    else:
        if not future.cancelled():
            future.set_result(result)


def run(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]], **options: Any) -> T:
    """What `main`, called with a new loop, returns on it; `options` are those of `VirtualLoop`."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(**options)) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        coro, results = main(loop), list[T]()

        async def play() -> None:  # does not return it: the runner would make the repr of what its task returns
            results.append(await coro)

        play.__qualname__ = getattr(coro, "__qualname__", play.__qualname__)  # by which a deadlock names it
        runner.run(play())
        return results[0]


class Process:
    """Tasks that die together: those that are spawned here, and all that they start.

    `kill` cancels them. What they still do meanwhile must reach nothing outside: network, disk and engines ask for
    `alive` before they do anything for a process. `freeze` stops them as SIGSTOP would: none of them runs, no timer of
    theirs goes off, and what arrives waits, until `thaw`.
    """

    def __init__(self, loop: VirtualLoop, name: str) -> None:
        self.loop, self.name, self.alive, self.frozen = loop, name, True, False
        self.held: list[asyncio.Handle] = []  # what is to run once it is frozen no more
        self.errors: list[BaseException] = []  # with which spawned tasks ended
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._on_kill: list[Callable[[], None]] = []
        self._context = copy_context()
        self._context.run(_process.set, self)

    def spawn(self, coro: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Task[T]:
        """A task of this process. Raises RuntimeError if it is dead."""
        if not self.alive:
            coro.close()
            raise RuntimeError(f"{self.name} is dead")
        task = self._context.run(self.loop.create_task, coro, name=name)
        task.add_done_callback(self._note_error)
        return task

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """See `VirtualLoop.create_task`. A dead process starts nothing."""
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
        if not self.alive:
            task.cancel()

    def on_kill(self, act: Callable[[], None]) -> None:
        """Call `act` when the process is killed, before its tasks notice."""
        self._on_kill.append(act)

    def kill(self) -> None:
        """End it at once; twice is once."""
        if not self.alive:
            return
        self.thaw()
        self.alive = False
        for act in self._on_kill:
            act()
        for task in list(self._tasks):
            task.cancel()

    def freeze(self) -> None:
        """Stop all of it; twice is once."""
        if self.alive and not self.frozen:
            self.frozen = True
            self.loop.frozen += 1

    def thaw(self) -> None:
        """Let it go on where it was stopped."""
        if self.frozen:
            self.frozen = False
            self.loop.frozen -= 1
            held, self.held = self.held, []
            self.loop.again(held)

    def hear(self, act: Callable[..., object], *args: Any) -> None:
        """Call what something outside wants of it, as soon as it runs."""
        if self.frozen:
            self.held.append(asyncio.Handle(act, args, self.loop, self._context.copy()))
        else:
            self._context.copy().run(act, *args)

    @property
    def tasks(self) -> int:
        """Tasks that have not ended."""
        return len(self._tasks)

    def _note_error(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.errors.append(error)


_process: ContextVar[Process | None] = ContextVar("process", default=None)


def current() -> Process | None:
    """The process whose task runs now; None outside of all."""
    return _process.get()
