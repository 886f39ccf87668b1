"""The digest of the native loops' sources. setup.py runs this file without the package, and builds the digest in.

`library.py` compares it with the digest of the sources that are there now.
"""

import hashlib
from pathlib import Path


def sources_digest(folder: Path) -> str:
    sources = sorted([*folder.glob("*.h"), *folder.glob("*.cpp")])
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sources)).hexdigest()[:16]
