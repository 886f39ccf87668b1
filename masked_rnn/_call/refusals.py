"""Errors in torch.nn's own words, with ours after them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from .._cells import Layer


def refusal(
    layer: Layer, kind: type[Exception], ask: Callable[[Any], Any], instead: str = "", more: str = "", **made: Any
) -> Exception:
    """Return the error to raise for a fault: in torch's words, followed by `more`.

    `ask` passes the faulty argument to a torch.nn layer of the same configuration and the options `made`. That layer is
    on the meta device, so it only checks its arguments. `instead` is used if torch raises nothing, and in compiled
    calls.
    """
    their = None
    if not torch.compiler.is_compiling():
        with suppress(Exception):  # some dtypes and transforms allow no new layer
            their = _layer_of_torch(layer, **made)
    try:
        if their is not None:
            ask(their)
    except (RuntimeError, ValueError) as error:
        return type(error)(_joined(str(error), more))
    except Exception:  # another error inside torch, whose message does not help
        pass
    return kind(_joined(instead, more))


def _layer_of_torch(layer: Any, **made: Any) -> Any:
    projected = {"proj_size": layer.proj_size} if layer.proj_size else {}
    return layer._torch_layer(
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        batch_first=layer.batch_first,
        bidirectional=layer.bidirectional,
        device="meta",
        **projected,
        **made,
    )


def _joined(words: str, more: str) -> str:
    return f"{words.rstrip('.')}. {more}" if words and more else words or more
