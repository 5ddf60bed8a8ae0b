"""The process that takes the main text out of pages, one after another, under limits of memory and time.

Started as a script by extraction.py; at the limits it is the kernel that ends it. Reads and writes messages of 8 bytes
of length and JSON. The first message says that it works; a page is answered by its text or by a fault.
"""

import json
import math
import resource
import struct
import sys
import time
from typing import IO, Any

LENGTH = struct.Struct("<Q")
DATES = {"extensive_search": False, "original_date": True, "max_date": "2100-01-01"}
"""Of htmldate: only what a page says of itself, and nothing that depends on today's date."""
PROOF = "A sentence that is long enough to be taken for the main text of a page, as it is here."


def receive(stream: IO[bytes]) -> Any | None:
    """A message; None where the stream ends."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(head)
    content = stream.read(size)
    return json.loads(content) if len(content) == size else None


def send(stream: IO[bytes], message: Any) -> None:
    content = json.dumps(message).encode()
    stream.write(LENGTH.pack(len(content)) + content)
    stream.flush()


def main_text(page: str, url: str) -> dict[str, str]:
    """{"text", "date", "licence"} or {"fault", "detail"}."""
    from lxml import etree, html
    from trafilatura import bare_extraction

    parser = html.HTMLParser(
        collect_ids=False, default_doctype=False, encoding="utf-8", remove_comments=True, remove_pis=True
    )
    try:
        tree = etree.fromstring(page.encode("utf-8", "replace"), parser=parser)
        if tree is None:
            return {"fault": "no_main_text", "detail": "nothing in it is HTML"}
        # The parser leaves out what is nested deeper than 256, and says so nowhere else.
        if too_deep := [e.message for e in parser.error_log if e.type == etree.ErrorTypes.ERR_RESOURCE_LIMIT]:
            return {"fault": "nested_too_deep", "detail": too_deep[0]}
        found = bare_extraction(
            tree, url=url or None, include_comments=False, with_metadata=True, date_extraction_params=DATES
        )
    except MemoryError:
        return {"fault": "extraction_memory", "detail": "more memory than a page may take"}
    except Exception as error:  # noqa: BLE001  # of any type: a page can make every part of the library fail
        return {"fault": "extraction_failed", "detail": f"{type(error).__name__}: {error}"}
    if not found or not (found["text"] or "").strip():
        return {"fault": "no_main_text", "detail": "the page has no main text"}
    return {"text": found["text"], "date": found["date"] or "", "licence": found["license"] or ""}


def serve(memory: int, seconds: int) -> None:
    """Answer until the input ends.

    Args:
        memory: most bytes of address space.
        seconds: most CPU time for a page.
    """
    proof = main_text(f"<html><body><article><p>{PROOF}</p><p>{PROOF}</p></article></body></html>", "")
    send(sys.stdout.buffer, {"works": PROOF in proof.get("text", ""), "detail": proof.get("detail", "")})
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    while (message := receive(sys.stdin.buffer)) is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + seconds, hard))
        send(sys.stdout.buffer, main_text(message["page"], message["url"]))


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
