"""Recurrent layers for sequences of different lengths: `torch.nn`'s, with one more argument, `lengths`."""

from ._layers import MaskedGRU, MaskedLSTM, MaskedRNN

__all__ = ["MaskedGRU", "MaskedLSTM", "MaskedRNN"]
__version__ = "1.6.0"
