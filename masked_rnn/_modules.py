"""The place of the public classes in 1.0 and 1.1. A layer that was pickled whole by these releases names it."""

from ._layers import MaskedGRU, MaskedLSTM, MaskedRNN

__all__ = ["MaskedGRU", "MaskedLSTM", "MaskedRNN"]
