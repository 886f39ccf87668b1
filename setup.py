"""Builds the native loops if there is a compiler. pyproject.toml has the rest of the package's configuration."""

from pathlib import Path
from runpy import run_path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

ENGINE = Path("masked_rnn/_backends/bptt")
DIGEST = run_path(str(ENGINE / "digest.py"))["sources_digest"](ENGINE / "native")


class Wheel(bdist_wheel):
    """Names the wheel cp311-abi3-<platform> if the library is in it, else py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        built = any(Path(self.bdist_dir).rglob("_native.*"))
        return (python, abi, platform) if built else ("py3", "none", platform)


setup(
    cmdclass={"bdist_wheel": Wheel},
    ext_modules=[
        Extension(
            "masked_rnn._backends.bptt._native",
            sorted(str(path) for path in (ENGINE / "native").glob("*.cpp")),
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
                "-pthread",
            ],
            extra_link_args=["-pthread"],
            py_limited_api=True,
            optional=True,  # without the library, the loops of PyTorch's ops run
        )
    ],
)
