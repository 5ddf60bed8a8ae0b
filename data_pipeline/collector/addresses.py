"""Addresses: which pages are collected, under which name, and at which machines."""

import ipaddress
import socket
from collections.abc import Sequence
from fnmatch import fnmatch
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import NewConnectionError
from urllib3.poolmanager import PoolManager

PORTS = {"http": 80, "https": 443}
LONGEST = 2000
"""Characters of an address; a longer one comes out of a loop of links."""
SAFE = "%/:=&?~#+!$,;'@()*[]|"
"""Characters that are left as they are."""


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
    mapped = getattr(found, "ipv4_mapped", None) or found
    return mapped.is_global and not mapped.is_multicast


class _Guarded:
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


class _Http(_Guarded, HTTPConnection):
    pass


class _Https(_Guarded, HTTPSConnection):
    pass


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _Https


def pool(private: bool, connections: int) -> PoolManager:
    """What makes connections.

    Args:
        private: whether machines that are not on the public internet may be asked.
        connections: most hosts that are asked at the same time.
    """
    manager = PoolManager(num_pools=4 * connections, maxsize=1, retries=False)
    if not private:
        manager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
    return manager
