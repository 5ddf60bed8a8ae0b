"""Addresses: which pages are collected, under which name, and at which machines."""

import ipaddress
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from contextvars import ContextVar
from fnmatch import fnmatch
from typing import Self
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import NewConnectionError
from urllib3.poolmanager import PoolManager
from urllib3.response import HTTPResponse

PORTS = {"http": 80, "https": 443}
LONGEST = 2000
"""Characters of an address; a longer one comes out of a loop of links."""
SAFE = "%/:=&?~#+!$,;'@()*[]|"
"""Characters that are left as they are."""

ENDS_IN_IPV4 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))
"""NAT64 (RFC 6052), and the compatible addresses of RFC 4291."""


class PrivateAddressError(Exception):
    """A host name leads to a machine that is not on the public internet."""


def normal(url: str, base: str = "") -> str | None:
    """The one spelling of an address under which it is known; None for what is not collected.

    Args:
        url: as a link has it.
        base: of the page with the link.
    """
    try:
        parts = urlsplit(urljoin(base, url.strip()))
        host, port = (parts.hostname or "").encode("idna").decode().lower(), parts.port
    except (ValueError, UnicodeError):
        return None
    if parts.scheme not in PORTS or not host or parts.username or parts.password:
        return None
    place = host if port in (None, PORTS[parts.scheme]) else f"{host}:{port}"
    place = f"[{host}]" + place.removeprefix(host) if ":" in host else place
    address = urlunsplit((parts.scheme, place, quote(parts.path or "/", SAFE), quote(parts.query, SAFE), ""))
    return address if len(address) <= LONGEST else None


def host_of(url: str) -> str:
    """Scheme, host and port: what has one robots.txt, and is asked no faster than it likes."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def among(url: str, hosts: Sequence[str]) -> bool:
    """Whether an address is at one of the hosts, given as shell patterns of names, with or without a port."""
    parts = urlsplit(url)
    return any(fnmatch(name, pattern) for pattern in hosts for name in (parts.netloc, parts.hostname or ""))


def public(address: str) -> bool:
    """Whether an IP address belongs to the public internet."""
    found = ipaddress.ip_address(address.split("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if any(found in network for network in ENDS_IN_IPV4):
            inner = ipaddress.IPv4Address(int(found) % 2**32)
        found = inner or found
    return found.is_global and not found.is_multicast


_deadline: "ContextVar[Deadline | None]" = ContextVar("deadline", default=None)


class Deadline:
    """Hangs up on a server when time is over, also one that never ceases to send a little of its answer.

    Args:
        seconds: for all that is asked within.
    """

    def __init__(self, seconds: float):
        self.over = False
        self._open = True
        self._line: socket.socket | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._hang_up)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._token = _deadline.set(self)
        self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._open = False
        self._timer.cancel()
        _deadline.reset(self._token)

    def watch(self, line: socket.socket | None) -> None:
        """What to hang up on."""
        self._line = line
        if self.over:
            self._hang_up()

    def _hang_up(self) -> None:
        with self._lock:
            if not self._open:
                return
            self.over = True
            if self._line is not None:
                with suppress(OSError):
                    socket.socket.shutdown(self._line, socket.SHUT_RDWR)  # beneath TLS, which another thread is using


class _Watched:
    """Answers within the time that is set."""

    def getresponse(self) -> HTTPResponse:
        if deadline := _deadline.get():
            deadline.watch(self.sock)  # type: ignore[attr-defined]
        return super().getresponse()  # type: ignore[misc, no-any-return]


class _Guarded(_Watched):
    """Connects to nothing but the public internet. What is checked is the address that is then connected to: a name
    that leads elsewhere the second time it is looked up gains nothing."""

    def _new_conn(self) -> socket.socket:
        host, port = self.host, self.port  # type: ignore[attr-defined]
        failure: OSError | None = None
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            if not public(str(address[0])):
                raise PrivateAddressError(f"{host} is {address[0]}, which is not on the public internet")
            found = socket.socket(family, kind, protocol)
            try:
                found.settimeout(self.timeout)  # type: ignore[attr-defined]
                found.connect(address)
            except OSError as error:
                found.close()
                failure = error
            else:
                return found
        raise NewConnectionError(self, f"cannot connect to {host}: {failure}")  # type: ignore[arg-type]


class _Http(_Guarded, HTTPConnection):  # type: ignore[misc]
    pass


class _Https(_Guarded, HTTPSConnection):  # type: ignore[misc]
    pass


class _AnyHttp(_Watched, HTTPConnection):  # type: ignore[misc]
    pass


class _AnyHttps(_Watched, HTTPSConnection):  # type: ignore[misc]
    pass


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _Https


class _AnyHttpPool(HTTPConnectionPool):
    ConnectionCls = _AnyHttp


class _AnyHttpsPool(HTTPSConnectionPool):
    ConnectionCls = _AnyHttps


def pool(private: bool, connections: int) -> PoolManager:
    """What makes connections.

    Args:
        private: whether machines that are not on the public internet may be asked.
        connections: most hosts that are asked at the same time.
    """
    manager = PoolManager(num_pools=4 * connections, maxsize=1, retries=False)
    kinds = (_AnyHttpPool, _AnyHttpsPool) if private else (_HttpPool, _HttpsPool)
    manager.pool_classes_by_scheme = dict(zip(("http", "https"), kinds, strict=True))
    return manager
