"""cuDNN over a padded batch, one call for each layer: its gates hold the state over padding (docs/backends.md).

It has not run on a GPU yet, so `auto` never takes it.
"""

from .gates import run, why_not

__all__ = ["run", "why_not"]
