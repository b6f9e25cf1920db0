"""Seeds that depend on names, not on what ran before."""

import hashlib


def derive_seed(root: int, *names: str | int) -> int:
    """A 63-bit seed from a root seed and names; any other name gives an unrelated seed."""
    text = "/".join([str(root), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1
