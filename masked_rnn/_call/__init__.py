"""Opens and closes a call: checks its arguments, brings them into one form, and gives results the form of the input.

It imports no backend.
"""

from .call import Call, close_call, open_call

__all__ = ["Call", "close_call", "open_call"]
