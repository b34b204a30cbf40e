"""Which of several processes have come, while JAX waits for all of them: it can't be asked before they have.

Every second each of them tells its number, in a datagram, to the host and port of JAX's coordinator (UDP beside its
TCP). The first process answers who is missing yet, so that all can say so when it takes too long.
"""

import contextlib
import socket
import time
from collections.abc import Sequence
from typing import final

EVERY = 1.0  # seconds between two datagrams of a process
MOST = 64  # processes that a datagram names
_OVER = b"over"


@final
class RollCall:
    """One process of those that tell their numbers; a context manager."""

    def __init__(self, address: str, count: int, number: int):
        """Args: address: host:port of the coordinator; count: of processes; number: of this one.

        Raises:
          OSError: there is no such host, or the port is taken.
        """
        host, port = address.rsplit(":", 1)
        self._number = number
        self._missing = set(range(count)) - {number} if number == 0 else {0}
        self._senders: dict[int, tuple] = {}
        if number == 0:
            self._socket = _listening(int(port))
        else:
            family, kind, protocol, _, place = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_DGRAM)[0]
            self._socket = socket.socket(family, kind, protocol)
            self._socket.connect(place)

    def __enter__(self) -> "RollCall":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    @property
    def missing(self) -> Sequence[int]:
        """The processes that have not come, of many the first; [0] as long as the first process does not answer."""
        return sorted(self._missing)[:MOST]

    def call(self, seconds: float = EVERY) -> bool:
        """Tells and hears for so many seconds; returns whether the first process has given up."""
        deadline = time.monotonic() + seconds
        if self._number:
            with contextlib.suppress(OSError):  # nobody is there yet
                self._socket.send(b"%d" % self._number)
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                data, sender = self._socket.recvfrom(1024)
            except TimeoutError:
                return False
            except OSError:  # nobody is there yet
                time.sleep(max(deadline - time.monotonic(), 0))
                return False
            if self._number:
                self._missing = {int(word) for word in data.split() if word.isdigit()}
                if data.startswith(_OVER):
                    return True
            elif data.isdigit():
                self._missing.discard(int(data))
                self._senders[int(data)] = sender
                self._send(b"", sender)
        return False

    def give_up(self) -> None:
        """Has all that the first process has heard give up too; of another one it does nothing."""
        for sender in self._senders.values():
            self._send(_OVER, sender)

    def _send(self, word: bytes, sender: tuple) -> None:
        with contextlib.suppress(OSError):  # one that is gone
            self._socket.sendto(b" ".join([word, *(b"%d" % number for number in self.missing)]), sender)


def _listening(port: int) -> socket.socket:
    """Returns a socket that hears datagrams at a port of all addresses, IPv4 and IPv6 where there is that."""
    if socket.has_dualstack_ipv6():
        both = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        both.bind(("::", port))
        return both
    four = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    four.bind(("", port))
    return four
