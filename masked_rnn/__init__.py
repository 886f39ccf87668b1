"""Recurrent layers for sequences of different lengths: `torch.nn`'s, with one more argument, `lengths`."""

from ._backends.bptt.library import SlowLoopsWarning
from ._environment import get_env_info
from ._layers import MaskedGRU, MaskedLSTM, MaskedRNN

__all__ = ["MaskedGRU", "MaskedLSTM", "MaskedRNN", "SlowLoopsWarning", "get_env_info"]
__version__ = "2.0.0"
