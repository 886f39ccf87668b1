"""The benchmark suite. README.md describes it; `python -m benchmarks --help` lists the options."""
