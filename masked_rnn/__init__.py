"""Recurrent layers for sequences of different lengths: `torch.nn`'s, with one more argument, `lengths`."""

from ._backends.bptt.library import SlowLoopsWarning
from ._environment import get_env_info
from ._layers import MaskedGRU, MaskedLSTM, MaskedRNN

__all__ = ["MaskedGRU", "MaskedLSTM", "MaskedRNN", "SlowLoopsWarning", "get_env_info"]
__version__ = "2.0.0"

for _name in __all__:
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = __name__  # a pickle names it, and would not load once the class had moved
