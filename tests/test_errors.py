"""Wrong input raises the right type, and names the element, both values and the cure, before anything is computed."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from support.oracle import INPUT, masked, plain, raised_in_graph
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import masked_rnn

X = torch.zeros(3, 6, INPUT)
MASK = torch.ones(3, 6, dtype=torch.bool)

LENGTHS: list[tuple[Any, type[Exception], str]] = [
    (
        [6, 7, 2],
        ValueError,
        r"lengths\[1\] = 7, but the input has only 6 time steps \(batch_first=True\)\. Expected 0 <= length <= 6\.",
    ),
    (
        torch.tensor([6, 2, -1]),
        ValueError,
        r"lengths\[2\] = -1, but a length can't be negative\. Expected 0 <= length <= 6\.",
    ),
    (
        [6, 2],
        ValueError,
        r"expected 3 lengths, one for each sequence of the input \(batch_first=True\), got 2\.$",
    ),
    (
        [3, 2, 1, 3, 2, 1],  # as many as steps
        ValueError,
        r"got 6\. If the input's second dimension is the batch, build the layer with batch_first=False\.$",
    ),
    (torch.tensor([[1], [2], [3]]), ValueError, r"lengths must have one dimension.*\(3, 1\).*Expected shape \(3,\)"),
    (torch.tensor(3), ValueError, r"lengths must have one dimension.*Expected shape \(3,\)"),
    ([[1], [2], [3]], ValueError, r"lengths must have one dimension, but lengths\[0\] is \[1\]"),
    (torch.tensor([1.0, 2.0, 3.0]), TypeError, r"dtype is torch\.float32.*Use lengths\.long\(\)\.$"),
    # There is no hint if following it would give a wrong result.
    (torch.tensor([1.5, 2.0, 3.0]), TypeError, r"dtype is torch\.float32.*integer dtype\.$"),
    (torch.tensor([1.0, torch.nan, 3.0]), TypeError, r"dtype is torch\.float32.*integer dtype\.$"),
    (
        torch.tensor([1.0, 0.4, 0.5]),
        TypeError,
        r"integer dtype\. If they are fractions of the 6 steps, use \(lengths \* 6\)\.round\(\)\.long\(\)\.$",
    ),
    (np.array([6.0, 4.0, 2.0]), TypeError, r"dtype is float64.*Use lengths\.astype\(int\)\.$"),
    (np.array([6, 4, 2], np.float16), TypeError, r"dtype is float16.*Use lengths\.astype\(int\)\.$"),
    (np.array([6, 4, 2], np.longdouble), TypeError, r"Use lengths\.astype\(int\)\.$"),
    (np.array([1.0, 0.4, 0.5]), TypeError, r"use \(lengths \* 6\)\.round\(\)\.astype\(int\)\.$"),
    (
        np.array([1.0, 1.0, 0.0]),
        TypeError,
        r"use \(lengths \* 6\)\.round\(\)\.astype\(int\); if they count steps, lengths\.astype\(int\)\.$",
    ),
    (torch.tensor([1.0, 1.0, 0.0]), TypeError, r"use \(lengths \* 6\).*; if they count steps, lengths\.long\(\)\.$"),
    ([1.0, 0.4, 0.5], TypeError, r"lengths\[0\] = 1\.0.*use \(torch\.tensor\(lengths\) \* 6\)\.round\(\)\.long\(\)\.$"),
    (np.array([1, 2.5, 3], dtype=object), TypeError, r"lengths\[1\] = 2\.5 is of type float"),
    (np.array([True, False, True]), TypeError, r"dtype is bool.*give torch\.as_tensor\(lengths\) as mask"),
    (
        [np.array([6]), np.array([2]), np.array([1])],
        ValueError,
        r"lengths\[0\] is array\(\[6\]\).*np\.concatenate\(lengths\)",
    ),
    ([6, np.array([2, 3]), 1], ValueError, r"one dimension, but lengths\[1\] is array\(\[2, 3\]\)\..*integer dtype\.$"),
    (
        torch.tensor([6, 2, 1], device="meta"),
        ValueError,
        r"lengths has no values.*the meta device\. Give it on the CPU",
    ),
    ([6, torch.tensor(2, device="meta"), 1], ValueError, r"lengths\[1\] has no values"),
    ((n for n in [6, 2, 1]), TypeError, r"got generator.*Use list\(lengths\)\.$"),
    (map(int, "621"), TypeError, r"got map.*Use list\(lengths\)\.$"),
    ({"a": 6, "b": 2, "c": 1}.values(), TypeError, r"got dict_values.*Use list\(lengths\)\.$"),
    ([6.0, 4.0, 2.0], TypeError, r"lengths\[0\] = 6\.0.*Use torch\.tensor\(lengths\)\.long\(\)\.$"),
    (
        [1.0, 0.0, 1.0],
        TypeError,
        r"use \(torch.*\.long\(\); if they count steps, torch\.tensor\(lengths\)\.long\(\)\.$",
    ),
    ([np.float32(6), 4, 2], TypeError, r"of type float32.*Use torch\.tensor\(lengths\)\.long\(\)\.$"),
    ([6.0, True, 2.0], TypeError, r"lengths\[0\] = 6\.0.*integer dtype\.$"),
    ([1, 10**30, 3], ValueError, r"lengths\[1\] = 1000.* is out of range\. Expected 0 <= length <= 6"),
    (np.array([1, 2**63, 3], dtype=np.uint64), ValueError, r"lengths\[1\] = 9223372036854775808 is out of range"),
    (torch.tensor([True, False, True]), TypeError, r"dtype is torch\.bool.*If it marks real steps, give it as mask"),
    (np.array([1.5, 2, 3]), TypeError, r"dtype is float64.*integer dtype\.$"),
    ([1, 2.0, 3], TypeError, r"lengths\[1\] = 2\.0 is of type float"),
    ([1.5, 1.0, 0.5], TypeError, r"lengths\[0\] = 1\.5 is of type float.*integer dtype\.$"),
    ([0.5, 1.0, -0.5], TypeError, r"lengths\[0\] = 0\.5 is of type float.*integer dtype\.$"),
    (
        [True, False, True],
        TypeError,
        r"lengths\[0\] = True is of type bool.*integer dtype\. If they mark real steps, give a bool tensor as mask\.$",
    ),
    ([1, True, 3], TypeError, r"lengths\[1\] = True is of type bool"),
    ([1, np.True_, 3], TypeError, r"lengths\[1\] = .*True.* is of type bool"),
    (["1", 2, 3], TypeError, r"lengths\[0\] = '1' is of type str"),
    ([torch.tensor(1.0), 2, 3], TypeError, r"lengths\[0\] = tensor\(1\.\)"),
    ("123", TypeError, r"got '123' of type str"),
    (2.0, TypeError, r"got 2\.0 of type float"),
    (True, TypeError, r"got True of type bool"),
    ({1, 2, 3}, TypeError, r"can't be read as integers, got set.*integer dtype\.$"),  # list() would lose the order
    (np.array(["a", "b", "c"]), TypeError, r"can't be read as integers"),
]


@pytest.mark.parametrize(
    ("lengths", "kind", "words"), LENGTHS, ids=[re.sub(r" at 0x\w+", "", str(v[0])) for v in LENGTHS]
)
def test_wrong_lengths_are_refused(lengths: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        masked("gru", batch_first=True)(X, lengths=lengths)


def test_checks_run_for_every_cell_and_backend(cell: str, backend: str) -> None:
    """The checks run before the choice of a backend, so the other tests of this file try one cell."""
    layer = masked(cell, batch_first=True, backend=backend)
    with pytest.raises(ValueError, match=r"lengths\[1\] = 7, but the input has only 6 time steps"):
        layer(X, lengths=[6, 7, 2])
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        layer(X, mask=MASK.long())


def test_error_names_the_layout() -> None:
    with pytest.raises(
        ValueError, match=r"lengths\[0\] = 4, but the input has only 3 time steps \(batch_first=False\)"
    ):
        masked("gru")(X, lengths=[4] * 6)


def test_wrong_unbatched_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lengths\[0\] = 7, but the input has only 6 time steps"):
        masked("gru")(X[0], lengths=7)
    with pytest.raises(ValueError, match=r"expected 1 length, one for each .*, got 2"):
        masked("gru")(X[0], lengths=[3, 3])
    with pytest.raises(ValueError, match=r"expected 1 length, one for each .*, got 6\.$"):
        masked("gru")(X[0], lengths=[1] * 6)
    for x in (X[0], X[:1]):
        with pytest.raises(ValueError, match=r"lengths\[0\] = 1000.* is out of range\. Expected 0 <= length <= 6"):
            masked("gru", batch_first=True)(x, lengths=10**30)


def test_as_many_lengths_as_steps_ask_for_the_batch() -> None:
    words = r"expected 6 lengths, .*, got 3\. If the input's first dimension is the batch, build .* batch_first=True\.$"
    with pytest.raises(ValueError, match=words):
        masked("gru")(X, lengths=[6, 2, 1])
    masked("gru", batch_first=True)(X, lengths=[6, 2, 1])


def test_whole_numbers_of_any_type_are_lengths() -> None:
    """The cures of the errors work, and so does every type that the annotations allow."""

    class Whole:
        def __index__(self) -> int:
            return 4

    layer = masked("gru", batch_first=True)
    expected = layer(X + 1, lengths=[6, 4, 2])[0]
    floats = np.array([6.0, 4.0, 2.0])
    given: list[Any] = [floats.astype(int), (floats / 6 * 6).round().astype(int), torch.tensor(floats.tolist()).long()]
    given += [(torch.tensor(6), torch.tensor(4), torch.tensor(2)), [np.int32(6), np.uint8(4), 2], [6, Whole(), 2]]
    given += [list(map(int, "642")), list({"a": 6, "b": 4, "c": 2}.values()), np.concatenate([[6], [4], [2]])]
    for lengths in given:
        assert torch.equal(layer(X + 1, lengths=lengths)[0], expected)
    for length in (4, np.int64(4), torch.tensor(4), Whole()):
        torch.testing.assert_close(layer(X[1] + 1, lengths=length)[0], expected[1])


MASKS: list[tuple[Any, type[Exception], str]] = [
    (
        MASK.t(),
        ValueError,
        r"mask has shape \(6, 3\), but the input's first dimensions are \(3, 6\) \(batch_first=True\).*"
        r"Use mask\.T; or, if the input's second dimension is the batch, batch_first=False\.$",
    ),
    (MASK.unsqueeze(-1), ValueError, r"mask has shape \(3, 6, 1\).*sequence\. Use mask\.squeeze\(-1\)\.$"),
    (MASK.unsqueeze(0), ValueError, r"mask has shape \(1, 3, 6\).*sequence\.$"),
    (MASK.float(), TypeError, r"dtype is torch\.float32\. Use mask\.bool\(\)"),
    (MASK.long(), TypeError, r"dtype is torch\.int64"),
    (MASK.tolist(), TypeError, r"must be a bool tensor, got list\. Use torch\.as_tensor\(mask\)\.$"),
    (MASK.numpy(), TypeError, r"must be a bool tensor, got ndarray\. Use torch\.as_tensor\(mask\)\.$"),
    (iter(MASK), TypeError, r"must be a bool tensor, got tuple_iterator\.$"),
    (MASK.to("meta"), ValueError, r"mask has no values, because it is on the meta device\. Give it on the CPU\.$"),
]


@pytest.mark.parametrize(("mask", "kind", "words"), MASKS)
def test_mask_of_wrong_shape_or_type_is_refused(mask: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        masked("gru", batch_first=True)(X, mask=mask)


@pytest.mark.parametrize("name", ["mask", "resets"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_marks_with_trailing_dimension_suggest_squeeze(name: str, batch_first: bool) -> None:
    """TorchRL's `is_init` has such a dimension."""
    layer = masked("gru", batch_first=batch_first)
    x, marks = (X, MASK) if batch_first else (X.transpose(0, 1), MASK.t())
    for input, own in ((x, marks), (X[0], MASK[0])):
        with pytest.raises(ValueError, match=rf"Use {name}\.squeeze\(-1\)\.$"):
            layer(input, **{name: own.unsqueeze(-1)})
        layer(input, **{name: own.unsqueeze(-1).squeeze(-1)})


@pytest.mark.parametrize(
    ("mask", "ending"),
    [
        (MASK.long(), r"torch\.int64\. Use mask\.bool\(\)\.$"),
        (MASK.float(), r"torch\.float32\. Use mask\.bool\(\)\.$"),
        (torch.where(MASK, 0.0, -torch.inf), r"dtype is torch\.float32\.$"),  # all 0 may mean all real, or nothing
        (MASK.long() * 0, r"torch\.int64\. Use mask\.bool\(\)\.$"),
        (torch.tensor([[0.0, -torch.inf] * 3] * 3), r"added to scores, 0 at real steps: use mask == 0\.$"),
        (torch.rand(3, 6) + 1.5, r"dtype is torch\.float32\.$"),
    ],
)
def test_mask_of_other_dtype_gets_fitting_hint(mask: Any, ending: str) -> None:
    with pytest.raises(TypeError, match=ending):
        masked("gru", batch_first=True)(X, mask=mask)


LIKE_LENGTHS = [[3, 1, 2], (3, 1, 2), torch.tensor([3, 1, 2]), np.array([3, 1, 2]), 3, [torch.tensor(3), 1, 2], [3, 1]]


@pytest.mark.parametrize("lengths", LIKE_LENGTHS, ids=str)
def test_lengths_passed_as_hx_are_refused(lengths: Any, cell: str) -> None:
    """Users may write `gru(x, lengths)`."""
    words = r"the second argument, hx, is the initial state, but got whole numbers.*pass lengths=\.\.\., as in [^.]*\.$"
    layer = masked(cell, batch_first=True)
    with pytest.raises(TypeError, match=words):
        layer(X, lengths)
    with pytest.raises(TypeError, match=words), torch.autocast("cpu"):
        layer(X, lengths)
    with pytest.raises(TypeError, match=r"got a bool tensor.*mask=\.\.\. if it marks real steps, resets=\.\.\. if"):
        layer(X, MASK)
    with pytest.raises(TypeError, match=r"a PackedSequence carries its own: leave them out"):
        layer(pack_sequence([torch.zeros(2, INPUT)]), lengths)


def test_lengths_and_mask_together_are_refused() -> None:
    with pytest.raises(ValueError, match="lengths and mask say the same thing: give one of them"):
        masked("gru", batch_first=True)(X, lengths=[6, 6, 6], mask=MASK)


@pytest.mark.parametrize("given", [{"lengths": [2, 1]}, {"mask": torch.ones(2, 2, dtype=torch.bool)}], ids=str)
def test_packed_and_nested_input_refuse_lengths_and_mask(given: dict[str, Any]) -> None:
    layer = masked("gru")
    name = next(iter(given))
    rows = [torch.zeros(2, INPUT), torch.zeros(1, INPUT)]
    with pytest.raises(ValueError, match=f"a PackedSequence carries its own lengths: {name} must be None"):
        layer(pack_sequence(rows), **given)
    with pytest.raises(ValueError, match=f"a nested tensor carries its own lengths: {name} must be None"):
        layer(torch.nested.nested_tensor(rows, layout=torch.jagged), **given)


@pytest.mark.parametrize(
    ("rows", "sizes", "order", "words"),
    [
        (6, [1, 2, 3], None, r"batch_sizes can't grow, but batch_sizes\[0\] = 1 and batch_sizes\[1\] = 2"),
        (7, [3, 2, 4], None, r"batch_sizes can't grow, but batch_sizes\[1\] = 2 and batch_sizes\[2\] = 4"),
        (2, [3, -1], None, r"batch_sizes\[1\] = -1 is negative"),
        (4, [3, 2, 1], None, "batch_sizes add up to 6, but data has 4 rows"),
        (9, [3, 2, 1], None, "batch_sizes add up to 6, but data has 9 rows"),
        (6, [3, 2, 1], [0, 1, 7], r"sorted_indices must hold each of 0 to 2 once, but sorted_indices\[2\] = 7"),
        (6, [3, 2, 1], [0, -1, 2], r"sorted_indices must hold each of 0 to 2 once, but sorted_indices\[1\] = -1"),
        (6, [3, 2, 1], [1, 1, 0], r"sorted_indices must hold each of 0 to 2 once, but sorted_indices\[1\] = 1"),
        (6, [3, 2, 1], [1, 0], r"sorted_indices has 2 elements, but batch_sizes\[0\] = 3"),
    ],
)
def test_packed_sequence_with_wrong_fields_is_refused(
    cell: str, rows: int, sizes: list[int], order: list[int] | None, words: str
) -> None:
    """The constructor of PackedSequence checks nothing, so the native loops would read past its memory."""
    places = None if order is None else torch.tensor(order)
    packed = PackedSequence(torch.zeros(rows, INPUT), torch.tensor(sizes), places, places)
    with pytest.raises(ValueError, match=f"a PackedSequence's {words}. Make it by"):
        masked(cell)(packed)


@pytest.mark.parametrize(
    ("offsets", "lengths", "words"),
    [
        ([0, 3, 9], None, "has 7 rows, but its sequence 1 has 6 from row 3 on, and the next one begins at row 9"),
        ([0, 5, 2, 7], None, "has 7 rows, but its sequence 1 has -3 from row 5 on, and the next one begins at row 2"),
        ([-2, 3, 7], None, "has 7 rows, but its sequence 0 has 5 from row -2 on, and the next one begins at row 3"),
        ([0, 3, 7], [4, 1], "has 7 rows, but its sequence 0 has 4 from row 0 on, and the next one begins at row 3"),
        ([0, 3, 7], [3, -1], "has 7 rows, but its sequence 1 has -1 from row 3 on, and the next one begins at row 7"),
    ],
)
def test_nested_tensor_outside_its_memory_is_refused(
    cell: str, offsets: list[int], lengths: list[int] | None, words: str
) -> None:
    own = None if lengths is None else torch.tensor(lengths)
    nested = torch.nested.nested_tensor_from_jagged(
        torch.zeros(7, INPUT), torch.tensor(offsets), own, min_seqlen=0, max_seqlen=7
    )
    with pytest.raises(ValueError, match=f"a nested input {words}. Make it by"):
        masked(cell)(nested)


def test_strided_nested_input_is_refused() -> None:
    with pytest.warns(UserWarning, match="prototype"):
        nested = torch.nested.nested_tensor([torch.zeros(2, INPUT), torch.zeros(1, INPUT)], layout=torch.strided)
    with pytest.raises(ValueError, match=r"jagged layout.*layout=torch\.jagged"):
        masked("gru")(nested)


@pytest.mark.parametrize(("shape", "dims"), [((), None), ((INPUT, 2), None), ((INPUT,), (1, 2))], ids=str)
def test_nested_input_of_wrong_shape_is_refused(shape: tuple[int, ...], dims: tuple[int, int] | None) -> None:
    nested = torch.nested.nested_tensor([torch.zeros(n, *shape) for n in (2, 1)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"must be of shape \(N, j, I\) with time ragged, got \(2, "):
        masked("gru")(nested if dims is None else nested.transpose(*dims))


def test_enforce_sorted_refuses_unsorted_lengths(backend: str) -> None:
    layer = masked("gru", batch_first=True, enforce_sorted=True, backend=backend)
    words = r"lengths\[2\] = 3 is longer than lengths\[1\] = 2.*enforce_sorted=False"
    with pytest.raises(ValueError, match=words):
        layer(X, lengths=[6, 2, 3])
    mask = torch.arange(6) < torch.tensor([[6], [2], [3]])
    with pytest.raises(ValueError, match=words):
        layer(X, mask=mask)


def packed(data: Tensor, order: list[int] | None = None) -> PackedSequence:
    places = None if order is None else torch.tensor(order)
    return PackedSequence(data, torch.tensor([3, 2, 1]), places, places)


def states(layer: Any, *shape: int | None) -> Any:
    """Returns hx of this shape. None stands for each state's own width."""
    widths = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 2 if layer.mode == "LSTM" else 1]
    made = [torch.zeros([w if n is None else n for n in shape]) for w in widths]
    return made[0] if len(made) == 1 else tuple(made)


ROWS = torch.zeros(6, INPUT)
REFUSED: dict[str, tuple[Any, tuple[int | None, ...] | None]] = {
    "width": (torch.zeros(3, 6, INPUT + 1), None),
    "width, unbatched": (torch.zeros(6, INPUT + 1), None),
    "width, packed": (packed(torch.zeros(6, INPUT + 1)), None),
    "4-D": (torch.zeros(1, 3, 6, INPUT), None),
    "1-D": (torch.zeros(INPUT), None),
    "0-D": (torch.zeros(()), None),
    "packed 3-D": (packed(torch.zeros(6, 1, INPUT)), None),
    "packed 1-D": (packed(torch.zeros(6)), None),
    "dtype": (X.double(), None),
    "dtype, unbatched": (X[0].bfloat16(), None),
    "dtype, packed": (packed(ROWS.double()), None),
    "dtype, one step": (X[:, :1].double(), None),
    "ids": (X.long(), None),
    "no steps": (X[:, :0], None),
    "hx batch": (X, (1, 2, None)),
    "hx batch, one step": (X[:, :1], (1, 2, None)),
    "hx layers": (X, (2, 3, None)),
    "hx width": (X, (1, 3, 7)),
    "hx of unbatched, layers": (X[0], (2, None)),
    "hx of packed, batch": (packed(ROWS), (1, 2, None)),
    "hx of packed, width": (packed(ROWS, [2, 0, 1]), (1, 3, 7)),
}
"""The input, and the shape of the states."""
OTHER_DIMS: dict[str, tuple[Any, tuple[int | None, ...], str]] = {
    "4-D": (X, (1, 1, 3, None), r"Expected NAME of size \(1, 3, W\), or flattened \(3, W\), got \[1, 1, 3, W\]\."),
    "1-D": (X, (None,), r"Expected NAME of size \(1, 3, W\), or flattened \(3, W\), got \[W\]\."),
    "flat": (X, (3, 7), r"Expected NAME of size \(1, 3, W\), or flattened \(3, W\), got \[3, 7\]\."),
    "unbatched, 3-D": (X[0], (1, 1, None), r"Expected NAME of .*, got \[1, 1, W\]\. Use NAME\.squeeze\(1\)\."),
    "unbatched, flat": (X[0], (7,), r"Expected NAME of size \(1, W\), or flattened \(W,\), got \[7\]\."),
    "packed, flat": (packed(ROWS), (3, 7), r"Expected NAME of size \(1, 3, W\), or flattened \(3, W\), got \[3, 7\]\."),
}
"""The input, the shape of the states, and the whole message. torch says that they should be 3-D, or 2-D."""


@pytest.mark.parametrize("case", OTHER_DIMS)
def test_states_of_other_dims_are_refused_in_own_words(case: str, cell: str) -> None:
    x, shape, words = OTHER_DIMS[case]
    layer = masked(cell, batch_first=True)
    hx = states(layer, *shape)
    name, width = ("hx[0]", layer.proj_size or 3) if isinstance(hx, tuple) else ("hx", 3)
    found = refused(layer, x, hx)
    assert type(found) is type(refused_by_torch(plain(cell, batch_first=True), x, hx))
    assert re.fullmatch(words.replace("NAME", re.escape(name)).replace("W", str(width)), str(found))


def test_batch_first_states_are_refused_with_their_cure(cell: str) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True)
    hx = states(layer, 3, 4, None)
    name, first = ("hx[0]", hx[0]) if isinstance(hx, tuple) else ("hx", hx)
    found = str(refused(layer, X, hx))
    assert found.endswith(f" {name} may also be flattened, (3, {4 * first.size(2)}). Use {name}.transpose(0, 1).")
    assert found.count("[3, 4, ") == 1
    layer(X, tuple(h.transpose(0, 1) for h in hx) if isinstance(hx, tuple) else hx.transpose(0, 1))


def refused_by_torch(layer: Any, x: Any, hx: Any) -> Exception:
    """Returns torch's error, in the words of the installed release."""
    if isinstance(x, PackedSequence) and layer.mode == "LSTM":
        # nn.LSTM has this check, and does not call it for a PackedSequence.
        hx = states(layer, 1, 3, None) if hx is None else hx
        return refused(layer.check_forward_args, x.data, hx, x.batch_sizes)
    return refused(layer, x, hx)


def refused(call: Any, *given: Any) -> Exception:
    with pytest.raises((RuntimeError, ValueError)) as error:
        call(*given)
    return error.value


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_refused_in_torchs_words(case: str, cell: str) -> None:
    x, shape = REFUSED[case]
    layer = masked(cell, batch_first=True)
    hx = None if shape is None else states(layer, *shape)
    theirs, ours = refused_by_torch(plain(cell, batch_first=True), x, hx), refused(layer, x, hx)
    assert type(ours) is type(theirs)
    assert str(ours).startswith(str(theirs))


@pytest.mark.parametrize("case", ["width", "dtype", "hx batch", "hx layers", "hx width"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_torchs_words_hold_in_other_layouts(case: str, options: dict[str, Any], cell: str) -> None:
    x, shape = REFUSED[case]
    layer = masked(cell, **options)
    hx = None if shape is None else states(layer, *shape)
    theirs, ours = refused_by_torch(plain(cell, **options), x, hx), refused(layer, x, hx)
    assert (type(ours), str(ours)[: len(str(theirs))]) == (type(theirs), str(theirs))


@pytest.mark.parametrize("cell", ["lstm", "lstm-proj"])
@pytest.mark.parametrize("x", [X, packed(ROWS)], ids=["padded", "packed"])
def test_wrong_cell_state_is_refused_in_torchs_words(x: Any, cell: str) -> None:
    layer, theirs = masked(cell, batch_first=True), plain(cell, batch_first=True)
    h, c = states(layer, 1, 3, None)
    expected = refused_by_torch(theirs, x, (h, c[:, :2]))
    assert str(refused(layer, x, (h, c[:, :2]))).startswith(str(expected))
    # A flattened h is right, so the error names c.
    assert str(refused(layer, x, (h.flatten(0, 1), c[:, :2]))).startswith(str(expected))


def test_own_hints_follow_torchs_words(cell: str) -> None:
    layer = masked(cell, batch_first=True)
    width, name = layer.proj_size or 3, "hx[0]" if layer.mode == "LSTM" else "hx"
    assert str(refused(layer, X, states(layer, 1, 2, None))).endswith(
        f"(1, 3, {width}), got [1, 2, {width}]. {name} may also be flattened, (3, {width})."
    )
    assert str(refused(layer, X.long())).endswith(". If these are ids, embed them first: torch.nn.Embedding.")


def test_functional_weights_of_other_dtype_are_refused(cell: str) -> None:
    layer, theirs = masked(cell, batch_first=True), plain(cell, batch_first=True)
    double = {name: weight.double() for name, weight in layer.named_parameters()}
    with pytest.raises(ValueError, match=r"(?=.*float32).*float64") as expected:
        torch.func.functional_call(theirs, double, (X,))
    with pytest.raises(ValueError, match=r"(?=.*float32).*float64") as found:
        torch.func.functional_call(layer, double, (X,))
    assert str(found.value) == str(expected.value)


def test_nested_input_is_refused_like_packed_input(cell: str) -> None:
    layer, theirs = masked(cell), plain(cell)
    for data, hx in ((ROWS.double(), None), (torch.zeros(6, 5), None), (ROWS, states(layer, 1, 2, None))):
        nested = torch.nested.nested_tensor_from_jagged(data, torch.tensor([0, 3, 5, 6]))
        expected = refused_by_torch(theirs, packed(data), hx)
        found = refused(layer, nested, hx)
        assert (type(found), str(found)[: len(str(expected))]) == (type(expected), str(expected))


def test_error_words_come_from_installed_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = masked("gru", batch_first=True)

    def says(error: Exception) -> Any:
        def check_input(*_: Any) -> None:
            raise error

        return check_input

    monkeypatch.setattr(nn.RNNBase, "check_input", says(RuntimeError("in other words")))
    found = refused(layer, X.double())
    assert (type(found), str(found)) == (RuntimeError, "in other words")
    # A release without such a check, or with one of another signature.
    for check_input in (says(AttributeError()), lambda *_: None):
        monkeypatch.setattr(nn.RNNBase, "check_input", check_input)
        found = refused(layer, X.double())
        assert (type(found), str(found)) == (
            ValueError,
            "input has dtype torch.float64, but the weights have torch.float32",
        )


def test_error_leaves_random_state_unchanged() -> None:
    layer, state = masked("gru", batch_first=True), torch.get_rng_state()
    refused(layer, X.double())
    assert torch.equal(torch.get_rng_state(), state)


def test_hx_of_other_dtype_is_named_in_error(cell: str) -> None:
    """torch's error is the one of its kernel. Ours names hx."""
    layer = masked(cell, batch_first=True)
    hx = states(layer.double(), 1, 3, None)
    refused_by_torch(plain(cell, batch_first=True).double(), X.double(), hx)
    assert "has dtype torch.float32, but the input has torch.float64. Convert it" in str(refused(layer, X.double(), hx))


def test_hx_of_wrong_shape_or_type_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Expected hx of size \(1, 3, 3\), or flattened \(3, 3\), got \[3, 4\]"):
        masked("gru", batch_first=True)(X, torch.zeros(3, 4))
    h = torch.zeros(2, 3, 3)
    for wrong, got in ((h, "Tensor"), ((h, h, h), "tuple of 3"), ([], "list of 0")):
        with pytest.raises(RuntimeError, match=rf"^MaskedLSTM: hx must be the pair \(h_0, c_0\), got a {got}\.$"):
            masked("lstm", batch_first=True, bidirectional=True)(X, wrong)
    with pytest.raises(RuntimeError, match=r"got \[1, 3, 4\]\. hx\[1\] may also be flattened, \(3, 3\)\.$"):
        masked("lstm", batch_first=True)(X, (torch.zeros(1, 3, 3), torch.zeros(1, 3, 4)))
    with pytest.raises(TypeError, match="hx must be a tensor, got list"):
        masked("gru", batch_first=True)(X, [0.0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_script_is_refused_with_what_works() -> None:
    words = "torch.jit.script can't compile MaskedGRU.*torch.compile or torch.export, or torch.jit.trace"
    for module in (masked("gru"), nn.Sequential(nn.Linear(2, 4), masked("gru"))):
        with pytest.raises(NotImplementedError, match=words):
            torch.jit.script(module)


def test_input_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="expected input to be a tensor or a PackedSequence, got list"):
        masked("gru")([[1.0]])


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_size": 0},
        {"input_size": 4.0},
        {"hidden_size": 0},
        {"hidden_size": 1.5},
        {"num_layers": 0},
        {"dropout": 1.5},
        {"dropout": -0.1},
        {"dropout": True},
        {"dropout": "a"},
        {"bias": 1},
        {"batch_first": 1},
        {"nonsense": 1},
        {"proj_size": 3},
        {"proj_size": -1},
        {"nonlinearity": "gelu"},
        {"mode": "GRU"},
        {"device": "nowhere"},
        {"dtype": torch.int64},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_constructor_refuses_arguments_like_torch(kind: str, arguments: dict[str, Any]) -> None:
    everything: dict[str, Any] = {"input_size": 4, "hidden_size": 3, **arguments}
    try:
        getattr(nn, kind)(**everything)
    except Exception as error:
        theirs = error
    else:
        # This release of torch does not refuse it.
        getattr(masked_rnn, f"Masked{kind}")(**everything)
        return
    with pytest.raises(type(theirs)) as ours:
        getattr(masked_rnn, f"Masked{kind}")(**everything)
    assert (type(ours.value), str(ours.value)) == (type(theirs), str(theirs))


@pytest.mark.parametrize("option", ["enforce_sorted", "flatten_hidden"])
def test_options_refuse_non_bools(option: str) -> None:
    with pytest.raises(TypeError, match=f"{option} should be of type bool, got: int"):
        masked("gru", 4, 3, **{option: 1})


def test_unknown_backend_is_refused() -> None:
    words = r"backend='cudnn' does not exist.*'auto'.*'packed', 'padded', 'bptt', 'scan', 'held'"
    with pytest.raises(ValueError, match=words):
        masked("gru", 4, 3, backend="cudnn")
    layer = masked("gru", batch_first=True)
    layer.backend = "cudnn"
    for x, given in ((X, {}), (X, {"lengths": [6, 0, 2]}), (X[:, :1], {}), (X[:, :0], {"lengths": [0, 0, 0]})):
        with pytest.raises(ValueError, match=words):
            layer(x, **given)
    with pytest.raises((ValueError, Unsupported), match=raised_in_graph(words)):
        torch.export.export(layer, (X,))


@pytest.mark.parametrize("forced", ["packed", "padded", "bptt", "held"])
def test_forced_backend_reports_why_it_cannot_run(forced: str) -> None:
    layer = masked("gru", batch_first=True, backend=forced)
    words = rf"backend='{forced}' can't run this call: a torch\.func transform .* is active.*backend='auto'"
    with pytest.raises(ValueError, match=words):
        torch.func.vmap(lambda x: layer(x)[0])(X)


def test_wrong_lengths_raise_before_anything_runs(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    from masked_rnn import _dispatch

    ran: list[Any] = []
    monkeypatch.setattr(_dispatch, "choose", ran.append)
    with pytest.raises(ValueError, match="lengths"):
        masked("gru", batch_first=True, backend=backend)(X, lengths=[6, 6, 7])
    assert not ran
