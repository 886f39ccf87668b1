"""The record that the library takes: `Run` of engine/interface.h."""

from __future__ import annotations

import ctypes

NUMBERS = (
    *("cell", "item_bytes", "layers", "directions", "inputs", "hidden", "fed_back", "has_biases", "projects"),
    *("batch", "steps", "batch_first", "sequences", "rows", "padded_rows", "input_is_padded", "output_is_padded"),
    *("first_is_flat", "last_is_flat", "threads", "parallel"),
)
ARRAYS = (
    *("lengths", "sizes", "starts", "index", "order", "dropped", "weights", "x", "h_first", "c_first", "h_last"),
    *("c_last", "output", "saved", "d_output", "dh_last", "dc_last", "dh_first", "dc_first", "dx", "gradients"),
)


class Run(ctypes.Structure):
    """One pass over a stack of layers. engine/interface.h says what the fields mean.

    An array is two fields: its address, and the number of elements there. 0: there is no array.
    """

    _fields_ = tuple(
        (field, ctypes.c_int64) for field in (*NUMBERS, *(part for name in ARRAYS for part in (name, f"{name}_size")))
    )
