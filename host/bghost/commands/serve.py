"""Being the host: the one place where the host's code, the workers' code and the command line meet."""

import os
from collections.abc import Mapping, Sequence
from functools import partial

from loguru import logger

from bghost.host import guard, lock
from bghost.host.host import Host
from bghost.host.preload import Preload
from bghost.host.process import check_descriptors, inherited_fds, needed
from bghost.host.reading import Sets, Sources
from bghost.shared import logs, paths
from bghost.shared.errors import ConfigError, NotFound
from bghost.shared.names import near
from bghost.shared.paths import Directories
from bghost.shared.plugins import Found, discover
from bghost.worker import life


def serve(
    instance: str,
    kinds: Sequence[str],
    *,
    count: int | None = None,
    name: str | None = None,
    sets: Mapping[str, Mapping[str, str]] | None = None,
    config: str | None = None,
) -> int:
    """Be the host of *instance* until it ends.

    :param kinds: what to run, these alone; without any, the config file's workers.
    :param count: how many workers of each kind, instead of what the kind says.
    :param name: the worker's name, or what comes before the number.
    :param sets: settings by kind or extension, or ``host``.
    :param config: the config file; ``None`` for the one in the config directory, if there is one.
    :returns: the exit code.
    :raises BghostError: if it cannot start.
    """
    _keep_standard_fds()
    inherited = inherited_fds()  # before a plugin is imported that may open some on purpose
    sets = sets or {}
    directories = paths.directories(instance)
    catalog = discover()
    sources = sources_of(config, directories, sets)
    reading = sources.read(catalog)
    read = reading.config()
    logs.configure(read.host.log.level, read.host.log.file, read.host.log.format)
    named = {kind: catalog.kind(kind) for kind in (*kinds, *read.host.kinds, *(w.kind for w in read.workers))}
    if not named:
        raise ConfigError("nothing to run", hint="name a kind, or write [[worker]] tables into the config file")
    extensions = {found.name: found for found in catalog.active(read.host.plugins)}
    _check_sets(sets, named, extensions)
    paths.prepare(directories)
    with needed("the host cannot start"):
        held = lock.acquire(directories, read.host.stop_timeout)
        start_guard = partial(guard.start, directories.instance, directories.lock, held)
        first_guard = start_guard(read.host.stop_timeout, inherited)  # before a plugin is imported, which may be killed
    preload = Preload(reading, named, extensions)
    with needed("the kinds cannot be imported"):
        hooks, loaded = preload.load()
    if kinds:
        specs = [spec for kind in kinds for spec in preload.specs(kind, count, name)]
    else:
        specs = list(read.specs().values())
    if os.geteuid() == 0:
        logger.warning("running as root; workers have root's rights")
    check_descriptors(read.host.max_workers)
    with needed("the host cannot start"):
        host = Host(
            directories,
            read,
            sources,
            catalog,
            named,
            loaded,
            preload.extensions,
            hooks,
            life.live,
            stays=not kinds,
            inherited=inherited,
            pools=preload.pools,
            lock=held,
            guard=first_guard,
            guard_again=start_guard,
        )
    lock.sign(held, host.table.run_id)
    if not kinds:
        for index, table in enumerate(read.workers):
            with reading.at_settings(table.kind, index):
                host.accepted.check(table.specs()[0])
    return host.run(specs)


def sources_of(given: str | None, directories: Directories, sets: Sets) -> Sources:
    """What the config is read from.

    :param given: the file that was named; ``None`` for bghost.toml in the config directory, if there is one.
    """
    default = None if directories.config is None else os.path.join(directories.config, "bghost.toml")
    path = given if given is not None else default if default is not None and os.path.lexists(default) else None
    return Sources(path and os.path.abspath(path), default, dict(os.environ), sets)


def _check_sets(
    sets: Mapping[str, Mapping[str, str]], kinds: Mapping[str, Found], extensions: Mapping[str, Found]
) -> None:
    known = [*kinds, *extensions, "host"]
    for target in sets:
        if target not in known:
            raise NotFound(
                f"--set {target}...: {target!r} is neither a kind that is run nor an extension",
                hint=near(target, known),
            )


def _keep_standard_fds() -> None:
    """Have 0, 1 and 2 open, so that no file of ours gets such a number, and with it what is printed; stdin is empty."""
    null = os.open(os.devnull, os.O_RDWR)
    os.set_inheritable(null, True)  # it may be one of the three
    os.dup2(null, 0)
    for fd in (1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.dup2(null, fd)
    if null > 2:
        os.close(null)
