"""A call, opened and closed: arguments are checked and brought into one form, and results get the input's form back.

It imports no backend.
"""

from .call import Call, close_call, open_call

__all__ = ["Call", "close_call", "open_call"]
