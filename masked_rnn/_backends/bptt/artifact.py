"""The library's file name, and the digest of its sources. setup.py runs this file without the package.

setup.py builds the digest in. `library.py` compares it with the digest of the sources that are there now.
"""

import hashlib
import os
from pathlib import Path

LIBRARY = "_native.dll" if os.name == "nt" else "_native.so"
"""No version of Python is in the name, because the library has nothing of Python."""


def sources_digest(folder: Path) -> str:
    sources = sorted([*folder.glob("*.h"), *folder.glob("*.cpp")])
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sources)).hexdigest()[:16]
