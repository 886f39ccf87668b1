"""The CPU engine: forward and backward through time, with gradients derived by hand (docs/bptt.md)."""

from .autograd import run, why_not

__all__ = ["run", "why_not"]
