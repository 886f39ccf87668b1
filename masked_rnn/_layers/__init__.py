"""The public classes: thin subclasses of torch.nn's layers."""

from .gru import MaskedGRU
from .lstm import MaskedLSTM
from .rnn import MaskedRNN

__all__ = ["MaskedGRU", "MaskedLSTM", "MaskedRNN"]
