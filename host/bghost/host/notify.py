"""What systemd is told of the host (sd_notify): ready, reloading, stopping, a status line, and that it is alive."""

import os
import socket
import time
from collections.abc import Mapping


class Notify:
    """Sends to the socket that NOTIFY_SOCKET names; does nothing where it names none.

    The variables are taken out of the environment: what a worker starts is not to speak for the host.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) if path else None
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = environ.get("WATCHDOG_USEC", "")
        self.watchdog = int(usec) / 2e6 if path and ours and usec.isdigit() and int(usec) else None
        """Seconds between two signs of life, or ``None`` where nobody waits for them."""
        for name in ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"):
            os.environ.pop(name, None)
        self._status = ""

    @property
    def heard(self) -> bool:
        """Whether anybody is told."""
        return self._socket is not None

    def fds(self) -> list[int]:
        """The descriptors that a child must not keep."""
        return [self._socket.fileno()] if self._socket is not None else []

    def _send(self, text: str) -> None:
        if self._socket is not None:
            try:
                self._socket.sendto(text.encode(), self._address)
            except OSError:
                pass  # full, or nobody there: the host does not wait for systemd

    def ready(self) -> None:
        """The workers of the start are ready, or a reload is over."""
        self._send("READY=1")

    def reloading(self) -> None:
        """A config is being read; :meth:`ready` follows."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The stop has begun."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """A sign of life."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``; sent when it differs from the last."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")
