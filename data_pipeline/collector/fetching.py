"""One request: bounded in bytes and time, whatever the server does."""

from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

import urllib3
from urllib3.exceptions import HTTPError

from data_pipeline.collector.addresses import Deadline, PrivateAddressError

BLOCK = 2**16
"""Bytes read at a time."""


@dataclass(frozen=True)
class Answer:
    """What a server answered.

    Args:
        url: what was asked for.
        status: of HTTP; 0 where there was none.
        headers: as they came.
        body: as it came, not unpacked.
        fault: why there is no whole answer; empty if there is.
        lasting: of a fault, whether asking again is of no use.
        reason: what the server calls the status.
        received: bytes of the body, also where not all of it came.
    """

    url: str
    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    fault: str = ""
    lasting: bool = False
    reason: str = ""
    received: int = 0

    def header(self, name: str) -> str:
        """The value of a header; empty where it was not sent."""
        return next((value for key, value in self.headers if key.lower() == name), "")

    def all(self, name: str) -> list[str]:
        """The values of a header that may be sent more than once."""
        return [value for key, value in self.headers if key.lower() == name]

    @property
    def passing(self) -> bool:
        """Whether it may be otherwise soon."""
        return (bool(self.fault) and not self.lasting) or self.status in (408, 425, 429) or self.status >= 500

    def retry_after(self, now_s: float) -> float:
        """Seconds that the server asks to be left alone; 0 where it does not."""
        asked = self.header("retry-after").strip()
        if asked.isdigit():
            return float(asked[:9])
        try:
            return max(0.0, parsedate_to_datetime(asked).timestamp() - now_s) if asked else 0.0
        except (ValueError, TypeError, OverflowError):
            return 0.0


def fetch(pool: urllib3.PoolManager, url: str, headers: dict[str, str], most_bytes: int, timeout_s: float) -> Answer:
    """Ask once, following nothing.

    Args:
        pool: makes the connection.
        url: what to ask for.
        headers: to send.
        most_bytes: of the body; a longer one is a fault.
        timeout_s: for all of it, in seconds.
    """
    parts: list[bytes] = []
    status = received = 0
    with Deadline(timeout_s) as deadline:
        try:
            response = pool.request(
                "GET",
                url,
                headers={"Accept-Encoding": "gzip, deflate", **headers},
                preload_content=False,
                decode_content=False,
                redirect=False,
                retries=False,
                timeout=urllib3.Timeout(total=timeout_s),
            )
            status, fault, lasting = response.status, "", False
            try:
                while not fault and (block := response.read1(BLOCK, decode_content=False)):
                    parts.append(block)
                    received += len(block)
                    lasting = received > most_bytes
                    fault = f"more than {most_bytes:,} bytes" if lasting else ""
            finally:
                response.close()
        except PrivateAddressError as error:
            fault, lasting = str(error), True
        except (HTTPError, OSError, ValueError) as error:
            fault, lasting = f"{type(error).__name__}: {error}"[:500], False
    if deadline.over and not lasting:
        fault = f"not done within {timeout_s:g} s"
    if fault:
        return Answer(url, status, fault=fault, lasting=lasting, received=received)
    headers_in = [(str(key), str(value)) for key, value in response.headers.items()]
    return Answer(url, status, headers_in, b"".join(parts), reason=response.reason or "", received=received)
