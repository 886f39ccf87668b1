"""A small matrix product that keeps its sums in registers: what all products of the compiled loops are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .simd import FEATURES, I64, REGISTER_BYTES, Memory, Vector, first_lanes

TILE_ROWS = 8 if "avx512f" in FEATURES or "neon" in FEATURES else 6
"""With two registers to a row, what the machine's 32 or 16 registers hold beside the operands."""
TILE_BYTES = 2 * REGISTER_BYTES
"""Of a row of a tile."""


@intrinsic(prefer_literal=True)
def multiply_tile(
    typing_context: Any,
    like: Any,
    rows: Any,
    is_narrow: Any,
    a: Any,
    a_step: Any,
    b: Any,
    b_step: Any,
    start: Any,
    c: Any,
    c_offset: Any,
    depth: Any,
    columns: Any,
) -> Any:
    """C = start + A B for `rows` rows of two registers each.

    `a` and `c` are tables of the rows' addresses. A's next number in a row lies `a_step` bytes on, B's next row
    `b_step`. `start`: the address of the row that every row starts from; 0: C itself. `is_narrow`: only the first
    `columns` columns are there.
    """
    M, narrow = rows.literal_value, bool(is_narrow.literal_value)
    signature = types.void(like, rows, is_narrow, *[types.int64] * 9)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> Any:
        memory = Memory(builder, like)
        a, a_step, b, b_step, start, c, c_offset, depth, columns = arguments[3:]
        masks: list[ir.Value | None] = [None, None]
        if narrow:
            masks = [first_lanes(builder, columns, memory.lanes)]
            masks.append(first_lanes(builder, builder.sub(columns, I64(memory.lanes)), memory.lanes))

        def addresses(table: ir.Value) -> list[ir.Value]:
            pointer = builder.inttoptr(table, I64.as_pointer())
            return [builder.load(builder.gep(pointer, [I64(r)])) for r in range(M)]

        def halves(address: ir.Value) -> list[ir.Value]:
            return [address, builder.add(address, I64(REGISTER_BYTES))]

        rows_a = addresses(a)
        rows_c = [builder.add(row, c_offset) for row in addresses(c)]
        from_itself = builder.icmp_signed("==", start, I64(0))
        common = builder.add(start, c_offset)
        sums = [
            memory.load(address, mask)
            for row in rows_c
            for address, mask in zip(halves(builder.select(from_itself, row, common)), masks, strict=True)
        ]
        # Few rows leave a unit waiting for its last sum: they sum several numbers of the depth apart.
        apart = max(1, 4 // M)
        zero = ir.Constant(memory.vector, [0.0] * memory.lanes)

        def step(sums: Sequence[ir.Value], offset: ir.Value, b: ir.Value) -> list[ir.Value]:
            right = [memory.load(address, mask) for address, mask in zip(halves(b), masks, strict=True)]
            result = []
            for r in range(M):
                left = Vector(builder, memory.splat(builder.add(rows_a[r], offset)), memory.itemsize)
                for n in range(2):
                    result.append(left.call("fmuladd", left.new(right[n]), left.new(sums[2 * r + n])).value)
            return result

        def repeat(count: ir.Value, sums: Sequence[ir.Value], offset: ir.Value, b: ir.Value) -> list[ir.Value]:
            """Sums, offset into A and address in B after `count` times `len(sums) // 2M` steps."""
            before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
            carried = [*sums, offset, b, I64(0)]
            builder.cbranch(builder.icmp_signed(">", count, I64(0)), loop, after)
            builder.position_at_end(loop)
            inside = [builder.phi(v.type) for v in carried]
            *now, offset, b, done = inside
            new: list[ir.Value] = []
            for k in range(len(sums) // (2 * M)):
                new += step(now[2 * M * k : 2 * M * (k + 1)], offset, b)
                offset, b = builder.add(offset, a_step), builder.add(b, b_step)
            done = builder.add(done, I64(1))
            results = [*new, offset, b, done]
            for phi, first, then in zip(inside, carried, results, strict=True):
                phi.add_incoming(first, before)
                phi.add_incoming(then, loop)
            builder.cbranch(builder.icmp_signed("<", done, count), loop, after)
            builder.position_at_end(after)
            joined = []
            for first, then in zip(carried[:-1], results[:-1], strict=True):
                joined.append(builder.phi(first.type))
                joined[-1].add_incoming(first, before)
                joined[-1].add_incoming(then, loop)
            return joined

        turns = builder.sdiv(depth, I64(apart))
        *sums, offset, b = repeat(turns, [*sums, *[zero] * (2 * M * (apart - 1))], I64(0), b)
        if apart > 1:
            total = sums[: 2 * M]
            for k in range(1, apart):
                total = [builder.fadd(x, y) for x, y in zip(total, sums[2 * M * k : 2 * M * (k + 1)], strict=True)]
            *sums, _, _ = repeat(builder.srem(depth, I64(apart)), total, offset, b)
        for r, row in enumerate(rows_c):
            for n, (address, mask) in enumerate(zip(halves(row), masks, strict=True)):
                memory.store(sums[2 * r + n], address, mask)
        return context.get_dummy_value()

    return signature, generate
