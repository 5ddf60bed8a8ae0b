"""Seeds derived from names and numbers."""

import hashlib


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that is the same in every process and on every machine, and unrelated for different parts."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
