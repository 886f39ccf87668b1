"""Builds the native loops if there is a compiler. pyproject.toml has the rest of the package's configuration."""

import os
import shutil
from pathlib import Path
from runpy import run_path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

BPTT = Path("masked_rnn/_backends/bptt")
ENGINE = BPTT / "engine"
ARTIFACT = run_path(str(BPTT / "artifact.py"))
DIGEST = ARTIFACT["sources_digest"](ENGINE)

# These come after the user's flags (CXXFLAGS and the like), and undo what makes wrong numbers: NaN and infinity that do
# not exist, and sums in another order. A linker with such flags makes the whole process flush small numbers to zero.
EXACT = ["-O2", "-fno-fast-math", "-fno-unsafe-math-optimizations"]


class Library(build_ext):
    """Builds a library that has nothing of Python: neither a version in its name nor a function that initializes it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # MSVC lacks the vector types. setuptools calls Clang as it calls GCC for Windows.
        if os.name == "nt" and not self.compiler and shutil.which("clang++"):
            self.compiler = "mingw32"
            os.environ.setdefault("CC", "clang++")
            os.environ.setdefault("CXX", "clang++")

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], ARTIFACT["LIBRARY"])

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def get_libraries(self, ext: Extension) -> list[str]:
        return []


class Wheel(bdist_wheel):
    """Names the wheel py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_ext": Library, "bdist_wheel": Wheel},
    ext_modules=[
        Extension(
            "masked_rnn._backends.bptt._native",
            sorted(str(path) for path in ENGINE.glob("*.cpp")),
            define_macros=[("SOURCES_DIGEST", f'"{DIGEST}"')],
            extra_compile_args=[
                "-std=c++17",
                *EXACT,
                "-g0",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fopenmp-simd",
                "-fvisibility=hidden",
                "-Wno-psabi",
                "-pthread",
            ],
            extra_link_args=["-pthread", *EXACT, *(["-static"] if os.name == "nt" else [])],
            optional=True,  # without the library, the loops of PyTorch's ops run
        )
    ],
)
