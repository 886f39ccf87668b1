"""Builds the native loops, where there is a compiler. All else that the package is: pyproject.toml."""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

FOLDER = Path("masked_rnn/_backends/bptt/native")
SOURCES = sorted([*FOLDER.glob("*.h"), *FOLDER.glob("*.cpp")])
DIGEST = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in SOURCES)).hexdigest()[:16]

setup(
    ext_modules=[
        Extension(
            "masked_rnn._backends.bptt._native",
            [str(path) for path in SOURCES if path.suffix == ".cpp"],
            depends=[str(path) for path in SOURCES],
            define_macros=[("SOURCES_DIGEST", f'"{DIGEST}"')],
            extra_compile_args=[
                "-std=c++17",
                "-O2",
                "-g0",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fopenmp-simd",
                "-fvisibility=hidden",
                "-Wno-psabi",
            ],
            py_limited_api=True,
            optional=True,  # without it the loops of PyTorch's ops run
        )
    ]
)
