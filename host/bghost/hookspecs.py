"""The hooks that a plugin may implement: the manual of whoever writes a worker.

Mark an implementation with :data:`hookimpl`. Hooks are called with keyword arguments, so an implementation may leave
out what it does not need. Two kinds of plugin implement them:

- a **kind** (entry point group ``bghost.kinds``): a class, or a module. The class is made once, without arguments, in
  each worker process of that kind, never in the host; hooks that run in the host are its class or static methods.
- an **extension** (group ``bghost.plugins``): sees every worker. Where it is a class, it is made once in each process
  that it runs in; one with a ``Settings`` class is made with them (``[plugin.NAME]`` in bghost.toml). Its errors are
  logged and counted, and never keep a kind's hook from running or replace its result.

Worker hooks of a kind may be ``async def``; then all of them run in one task, on one event loop per worker.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import pluggy

from bghost.shared.spec import Reason, Recovery, Settings, WorkerSpec

if TYPE_CHECKING:
    from bghost.host.facade import HostView
    from bghost.shared.poolspec import PoolSpec
    from bghost.worker.pool import Event, Pool
    from bghost.worker.worker import Worker

hookspec: Final = pluggy.HookspecMarker("bghost")
hookimpl: Final = pluggy.HookimplMarker("bghost")
"""Marks a function as an implementation of the hook of its name."""


# In the host, at its start and end


@hookspec(firstresult=True)
def bghost_workers(settings: Settings) -> Sequence[WorkerSpec] | None:
    """The workers that ``bghost run KIND`` starts. Runs in: host, at its start. Implemented by: the kind.

    ``--count N`` overrides it. Without this hook, or when it returns ``None``, one worker is started.

    :param settings: the kind's settings (an instance of its ``Settings``; of ``bghost.Settings`` if it has none).
    """


@hookspec(firstresult=True)
def bghost_pools(settings: Settings) -> Sequence["PoolSpec[Any, Any]"] | None:
    """The pools that workers of this kind manage. Runs in: host, at its start. Implemented by: the kind.

    Their tables are made before the first fork, so a pool cannot come later.

    :param settings: the kind's own settings.
    """


@hookspec
def bghost_host_setup(host: "HostView") -> None:
    """Called before the first worker is forked. Runs in: host. Implemented by: kinds and extensions.

    May start services and ``host.launch()`` more workers. It may take its time: nothing else runs yet. An error
    of a kind ends the host (exit 1); an extension's is logged, unless it is a BghostError: that ends the host too.
    """


@hookspec
def bghost_host_cleanup(host: "HostView") -> None:
    """Called after the last worker has ended. Runs in: host. Implemented by: kinds and extensions."""


# In a worker


@hookspec
def bghost_setup(worker: "Worker[Any]") -> None:
    """Called once per process, before the first turn; when it returns, the worker is ready. Runs in: worker.

    An error here ends the worker with exit code 1.
    """


@hookspec(firstresult=True)
def bghost_main(worker: "Worker[Any]") -> None:
    """The worker's own loop, instead of the default one that calls ``bghost_tick``. Runs in: worker.

    Returning is being done: exit code 0. Implemented by: the kind; extensions may only wrap it.
    """


@hookspec(firstresult=True)
def bghost_tick(worker: "Worker[Any]") -> float | None:
    """One round of work. Runs in: worker. Implemented by: the kind; extensions may only wrap it.

    :returns: seconds to sleep before the next round, 0 for at once, ``bghost.UNTIL_WOKEN``, or ``None`` for the
        ``naptime`` of the kind's settings (until woken, where it has none).
    """


@hookspec
def bghost_reload(worker: "Worker[Any]", old: Settings, new: Settings) -> None:
    """Called between two ticks when the kind's settings have changed; ``worker.settings`` is *new*. Runs in: worker.

    An error here counts as a recovered error; the new settings stay.
    """


@hookspec(firstresult=True)
def bghost_recover(worker: "Worker[Any]", error: Exception) -> Recovery | None:
    """Decide what follows an error of a tick, after everything was rolled back and closed. Runs in: worker.

    Implemented by: the kind; extensions may only wrap it. ``None`` is ``Recovery.CONTINUE``.
    """


@hookspec
def bghost_cleanup(worker: "Worker[Any]", reason: Reason) -> None:
    """Called once at the worker's end if its setup began, before exit callbacks and the root scope. Runs in: worker.

    It has until the stop's deadline. It is not called after SIGQUIT or SIGKILL.
    """


# In the worker that manages a pool


@hookspec
def bghost_pool_launch_failed(worker: "Worker[Any]", pool: "Pool[Any, Any]", event: "Event") -> None:
    """An entry's worker has ended before it was ready, or could not be started; ``event.reason`` says why.

    Runs in: the pool's manager, in its main loop, like the other three. Events come in order, each once; one whose
    callback was running when the manager died comes again, with ``event.redelivered``. Raising counts as a recovered
    error, and the event as read.
    """


@hookspec
def bghost_pool_started(worker: "Worker[Any]", pool: "Pool[Any, Any]", event: "Event") -> None:
    """An entry's worker is ready. Runs in: the pool's manager."""


@hookspec
def bghost_pool_exited(worker: "Worker[Any]", pool: "Pool[Any, Any]", event: "Event") -> None:
    """An entry's worker has ended with 0, or as it was asked to. Runs in: the pool's manager."""


@hookspec
def bghost_pool_died(worker: "Worker[Any]", pool: "Pool[Any, Any]", event: "Event") -> None:
    """An entry's worker has ended in any other way; ``event.data`` is what it had published. Runs in: the manager."""


HOST_HOOKS: Final = frozenset({"bghost_workers", "bghost_pools", "bghost_host_setup", "bghost_host_cleanup"})
KIND_HOOKS: Final = frozenset({"bghost_workers", "bghost_pools", "bghost_main", "bghost_tick", "bghost_recover"})
"""Hooks that have one implementation, the kind's; an extension may only wrap those that run in a worker."""
