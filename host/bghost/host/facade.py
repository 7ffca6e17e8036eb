"""The host as a plugin sees it in ``bghost_host_setup`` and ``bghost_host_cleanup``."""

import os
from typing import TYPE_CHECKING

from loguru import logger

from bghost.shared.handle import Handle
from bghost.shared.plugins import Found
from bghost.shared.spec import Settings, WorkerSpec

if TYPE_CHECKING:
    from loguru import Logger

    from bghost.host.host import Host


class HostView:
    """What a plugin may ask of the host and have it do. Runs in: host."""

    def __init__(self, host: "Host") -> None:
        self._host = host
        self.log: Logger = logger

    @property
    def instance(self) -> str:
        """The instance's name."""
        return self._host.instance

    @property
    def run_id(self) -> int:
        """Which run of the host this is."""
        return self._host.table.run_id

    @property
    def kinds(self) -> dict[str, Found]:
        """The kinds that were named at the host's start."""
        return dict(self._host.kinds)

    @property
    def runtime_dir(self) -> str:
        """This instance's runtime directory, 0700; gone at the next boot."""
        return self._host.directories.runtime

    @property
    def state_dir(self) -> str:
        """This instance's directory for what may be lost, made 0700 when first asked for."""
        return _made(self._host.directories.state)

    @property
    def data_dir(self) -> str:
        """This instance's directory for what may not be lost, made 0700 when first asked for."""
        return _made(self._host.directories.data)

    def settings(self, kind: str) -> Settings:
        """The settings of a kind that was named at the host's start.

        :raises NotFound: if it was not.
        """
        return self._host.accepted.settings(kind)

    def launch(self, spec: WorkerSpec) -> Handle:
        """Have a worker run; it starts when the set-up is over.

        :raises LaunchError: if there is no slot, or its name is taken.
        """
        return self._host.launch(spec).handle


def _made(path: str) -> str:
    os.makedirs(path, mode=0o700, exist_ok=True)
    return path
