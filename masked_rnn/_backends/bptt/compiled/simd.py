"""Vector arithmetic that Numba has no words for: LLVM's vectors, written by hand into its compiled functions.

`Vector` records arithmetic as LLVM instructions, so that a cell's equations can be written once, in their own letters,
for any width. `elementwise` makes a compiled function of such equations. It takes addresses; `like`, a number, says of
which dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

I32, I64 = ir.IntType(32), ir.IntType(64)


def _features() -> str:
    given: str | None = config.CPU_FEATURES
    return given if given is not None else str(binding.get_host_cpu_features().flatten())


FEATURES = {f[1:] for f in _features().split(",") if f.startswith("+")}
REGISTER_BYTES = 64 if "avx512f" in FEATURES else 32 if "avx" in FEATURES else 16


class Vector:
    """A value of one register's lanes, while the instructions that compute it are written."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value, itemsize: int) -> None:
        self.builder, self.value, self.itemsize = builder, value, itemsize

    @property
    def lanes(self) -> int:
        return REGISTER_BYTES // self.itemsize

    def new(self, value: ir.Value) -> Vector:
        return Vector(self.builder, value, self.itemsize)

    def constant(self, number: float) -> Vector:
        return self.new(ir.Constant(self.value.type, [number] * self.lanes))

    def _with(self, other: Vector | float) -> Vector:
        return other if isinstance(other, Vector) else self.constant(other)

    # A product and a sum may become one instruction, which rounds once; nothing else may be rearranged.
    def __add__(self, other: Vector | float) -> Vector:
        return self.new(self.builder.fadd(self.value, self._with(other).value, flags=("contract",)))

    def __sub__(self, other: Vector | float) -> Vector:
        return self.new(self.builder.fsub(self.value, self._with(other).value, flags=("contract",)))

    def __mul__(self, other: Vector | float) -> Vector:
        return self.new(self.builder.fmul(self.value, self._with(other).value, flags=("contract",)))

    def __truediv__(self, other: Vector | float) -> Vector:
        return self.new(self.builder.fdiv(self.value, self._with(other).value))

    def __rsub__(self, other: float) -> Vector:
        return self.constant(other) - self

    def __neg__(self) -> Vector:
        return self.new(self.builder.fneg(self.value))

    def at_most(self, other: float, then: Vector | float, otherwise: Vector | float) -> Vector:
        """`then` where this is at most `other`; `otherwise` elsewhere, and where this is NaN."""
        is_at_most = self.builder.fcmp_ordered("<=", self.value, self.constant(other).value)
        return self.new(self.builder.select(is_at_most, self._with(then).value, self._with(otherwise).value))

    def call(self, name: str, *others: Vector) -> Vector:
        kind = self.value.type
        function = cgutils.get_or_insert_function(
            self.builder.module,
            ir.FunctionType(kind, [kind] * (1 + len(others))),
            f"llvm.{name}.v{self.lanes}f{8 * self.itemsize}",
        )
        return self.new(self.builder.call(function, [self.value, *(o.value for o in others)]))

    def power_of_two(self, added: int) -> Vector:
        """2^(k + added), where this is k + 1.5 · 2^(bits of a fraction): k's bits lie lowest."""
        bits = ir.VectorType(ir.IntType(8 * self.itemsize), self.lanes)
        fraction, bias = _FORMAT[self.itemsize][:2]

        def each(n: int) -> ir.Constant:
            return ir.Constant(bits, [n] * self.lanes)

        shifted = self.builder.shl(self.builder.bitcast(self.value, bits), each(fraction))
        shifted = self.builder.add(shifted, each((bias + added) << fraction))
        return self.new(self.builder.bitcast(shifted, self.value.type))


_FORMAT = {
    4: (23, 127, 7, (0.693359375, -2.12194440e-4)),
    8: (52, 1023, 13, (0.693147180369123816490, 1.90821492927058770002e-10)),
}
"""By a number's bytes: bits of its fraction, its exponent's bias, terms of exp, and ln 2 in two parts, the first of so
few bits that its product with k is exact."""


def _exp_parts(x: Vector, added: int) -> tuple[Vector, Vector]:
    """exp(x) = 2^k (1 + p): p, which keeps its digits near 0, and 2^(k + added)."""
    fraction, _, terms, (high, low) = _FORMAT[x.itemsize]
    nearest = 1.5 * 2.0**fraction  # added to a number, it leaves no room for its fraction
    rounded = x * math.log2(math.e) + nearest
    k = rounded - nearest
    r = x - k * high - k * low
    p = r.constant(1 / math.factorial(terms))
    for n in range(terms - 1, 1, -1):
        p = p * r + 1 / math.factorial(n)
    return p * r * r + r, rounded.power_of_two(added)


def sigmoid(x: Vector) -> Vector:
    """e / (1 + e) or 1 / (1 + e), e = exp(-|x|): no digit is lost on either side."""
    least = {4: -104.0, 8: -746.0}[x.itemsize]  # whose exp is 0
    down = -x.call("fabs")
    p, power = _exp_parts(down.at_most(least, least, down), added=64)
    e = (p + 1.0) * power * 2.0**-64  # below the smallest normal number, too
    return x.at_most(0.0, e, 1.0) / (e + 1.0)


def tanh(x: Vector) -> Vector:
    """-t / (2 + t), t = exp(-2|x|) - 1: no digit is lost near 0."""
    down = x.call("fabs") * -2.0
    p, power = _exp_parts(down.at_most(-80.0, -80.0, down), added=0)
    t = p * power + (power - 1.0)
    return (-t / (t + 2.0)).call("copysign", x)


def _float_type(like: types.Float) -> tuple[ir.Type, int]:
    return (ir.FloatType(), 4) if like == types.float32 else (ir.DoubleType(), 8)


def first_lanes(builder: ir.IRBuilder, count: ir.Value, lanes: int) -> ir.Value:
    """True in the first `count` lanes."""
    numbers = ir.VectorType(I64, lanes)
    undefined = ir.Constant(numbers, ir.Undefined)
    every = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    counts = builder.shuffle_vector(builder.insert_element(undefined, count, I32(0)), undefined, every)
    return builder.icmp_signed("<", ir.Constant(numbers, list(range(lanes))), counts)


class Memory:
    """Loads and stores of vectors at addresses, of the first lanes alone where a mask is given."""

    def __init__(self, builder: ir.IRBuilder, like: types.Float) -> None:
        self.builder = builder
        self.number, self.itemsize = _float_type(like)
        self.lanes = REGISTER_BYTES // self.itemsize
        self.vector = ir.VectorType(self.number, self.lanes)

    def _masked(self, what: str, result: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
        name = f"llvm.masked.{what}.v{self.lanes}f{8 * self.itemsize}.p0"
        kind = ir.FunctionType(result, [a.type for a in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def load(self, address: ir.Value, mask: ir.Value | None = None) -> ir.Value:
        pointer = self.builder.inttoptr(address, self.vector.as_pointer())
        if mask is None:
            return self.builder.load(pointer, align=self.itemsize)
        zero = ir.Constant(self.vector, [0.0] * self.lanes)
        return self._masked("load", self.vector, (pointer, I32(self.itemsize), mask, zero))

    def store(self, value: ir.Value, address: ir.Value, mask: ir.Value | None = None) -> None:
        pointer = self.builder.inttoptr(address, self.vector.as_pointer())
        if mask is None:
            self.builder.store(value, pointer, align=self.itemsize)
        else:
            self._masked("store", ir.VoidType(), (value, pointer, I32(self.itemsize), mask))

    def splat(self, address: ir.Value) -> ir.Value:
        """The number at an address, in every lane."""
        one = self.builder.load(self.builder.inttoptr(address, self.number.as_pointer()), align=self.itemsize)
        undefined = ir.Constant(self.vector, ir.Undefined)
        every = ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(self.builder.insert_element(undefined, one, I32(0)), undefined, every)


def elementwise(equations: Callable[..., tuple[Vector, ...]], inputs: int) -> Any:
    """f(like, count, addresses): `equations` over `count` numbers in a row, from inputs to outputs."""

    @intrinsic
    def apply(typing_context: Any, like: Any, count: Any, addresses: Any) -> Any:
        signature = types.void(like, types.int64, addresses)

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> Any:
            memory = Memory(builder, like)
            _, count, addresses = arguments
            addresses = cgutils.unpack_tuple(builder, addresses)
            sources, targets = addresses[:inputs], addresses[inputs:]
            lanes = I64(memory.lanes)

            def at(first: ir.Value, mask: ir.Value | None) -> None:
                offset = builder.mul(first, I64(memory.itemsize))
                values = [Vector(builder, memory.load(builder.add(a, offset), mask), memory.itemsize) for a in sources]
                for result, target in zip(equations(*values), targets, strict=True):
                    memory.store(result.value, builder.add(target, offset), mask)

            whole = builder.sub(count, builder.srem(count, lanes))
            with cgutils.for_range_slice(builder, I64(0), whole, lanes) as (first, _):
                at(first, None)
            with builder.if_then(builder.icmp_signed("<", whole, count)):
                at(whole, first_lanes(builder, builder.sub(count, whole), memory.lanes))
            return context.get_dummy_value()

        return signature, generate

    return apply


@intrinsic
def itemsize(typing_context: Any, like: Any) -> Any:
    """Bytes of a number."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> Any:
        return I64(_float_type(like)[1])

    return types.int64(like), generate


@intrinsic
def read(typing_context: Any, table: Any, place: Any) -> Any:
    """The whole number at a place in a table."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> Any:
        table, place = arguments
        return builder.load(builder.gep(builder.inttoptr(table, I64.as_pointer()), [place]))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def write(typing_context: Any, table: Any, place: Any, number: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> Any:
        table, place, number = arguments
        builder.store(number, builder.gep(builder.inttoptr(table, I64.as_pointer()), [place]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def move(typing_context: Any, like: Any, source: Any, target: Any) -> Any:
    """One number, to another address."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> Any:
        number = _float_type(like)[0].as_pointer()
        source, target = (builder.inttoptr(address, number) for address in arguments[1:])
        builder.store(builder.load(source), target)
        return context.get_dummy_value()

    return types.void(like, types.int64, types.int64), generate


@intrinsic
def take_number(typing_context: Any, counter: Any) -> Any:
    """The counter's number, which no other thread gets."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> Any:
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, I64(1), "monotonic")

    return types.int64(types.int64), generate


def reader(kind: Any) -> Any:
    """A compiled function that reads a NamedTuple of whole numbers at an address."""

    @intrinsic
    def at(typing_context: Any, address: Any) -> Any:
        record = types.NamedUniTuple(types.int64, len(kind._fields), kind)

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> Any:
            return builder.load(builder.inttoptr(arguments[0], context.get_value_type(record).as_pointer()))

        return record(types.int64), generate

    return at
