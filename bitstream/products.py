"""The integer product behind every layer of the prior, and what threads tell each other: the parts of the kernels that
numba cannot say and LLVM can.

``add_product`` multiplies bytes: activations of 0 to 255 by weights of -127 to 127, four inputs at a time, summed in
32 bits, hence exact on every processor. Processors with VNNI have one instruction for that (``vpdpbusd``), which makes
it 4 to 6 times as fast as the float32 products of a BLAS; others on x86 multiply 16 bits in pairs (``pmaddwd``), about
as fast as float32; the rest gets plain vector arithmetic that LLVM knows how to translate.

A layer's weights lie as (inputs / 4, outputs, 4): four inputs of 16 outputs fill 64 bytes. Inputs and outputs are
padded with zeros to multiples of 16, so that no loop needs a remainder.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import (  # type: ignore[attr-defined]
    _dynfunc,
    types,
)
from numba.core import cgutils, config
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.lowering import Lower
from numba.core.registry import cpu_target
from numba.core.typed_passes import NativeLowering
from numba.extending import intrinsic

njit: Any = numba.njit  # more than its type says
INTERPRETED = bool(getattr(config, "DISABLE_JIT", 0))


class _NotInlined(Lower):
    def lower_normal_function(self, description: Any) -> None:
        super().lower_normal_function(description)
        self.function.attributes.add("noinline")


@register_pass(mutates_CFG=True, analysis_only=False)
class _PartLowering(NativeLowering):
    """numba would optimise every function and make machine code of it, and again of its copy in each kernel."""

    _name = "vqcodec_part_lowering"

    def run_pass(self, state: Any) -> bool:
        library = state.library = state.targetctx.codegen().create_library(state.func_id.func_qualname)
        library._optimize_final_module = lambda: None
        library._finalize_final_module = lambda: setattr(library, "_finalized", True)
        state.flags.no_compile = True
        super().run_pass(state)
        description, _, _, env = state["cr"]
        stub = _dynfunc.make_function(description.lookup_module(), description.qualname, "", 0, env, (library,))
        state.targetctx.insert_user_function(stub, description, [library])
        state["cr"] = state["cr"]._replace(cfunc=stub)
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class _FunctionLowering(_PartLowering):
    """LLVM is not to copy it to every place that calls it, which would take seconds to compile."""

    _name = "vqcodec_function_lowering"
    lowering_class = _NotInlined


def _compiler(lowering: type[NativeLowering]) -> type[CompilerBase]:
    class Compiler(CompilerBase):
        def define_pipelines(self) -> Any:
            passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
            passes.passes = [(lowering if kind is NativeLowering else kind, why) for kind, why in passes.passes]
            passes.finalize()
            return [passes]

    return Compiler


# What kernels can do without: counting references (nothing is allocated) and rewrites (but for ``raise``).
LEAN = {"_nrt": False, "no_rewrites": True}
# Not for Python, which would take as long again. A division by zero has no exception.
_PART = {"nogil": True, "error_model": "numpy", "_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
function = njit(**_PART, no_rewrites=True, pipeline_class=_compiler(_FunctionLowering))
inlined = njit(**_PART, no_rewrites=True, pipeline_class=_compiler(_PartLowering))
_raising = njit(**_PART, pipeline_class=_compiler(_FunctionLowering))

_POINTER = ir.IntType(8).as_pointer()
UNIT = 16  # outputs that are computed together, and what widths are rounded up to
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


def _instructions() -> tuple[int, str]:
    """32-bit numbers in a register, and the instruction for products, of the processor that is compiled for."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    has = set(features.split(","))
    if not triple.startswith(("x86_64", "i686", "amd64")):
        return 4, ""
    if "+avx512vnni" in has:
        return 16, "llvm.x86.avx512.vpdpbusd.512"
    if "+avxvnni" in has:
        return 8, "llvm.x86.avx512.vpdpbusd.256"
    if "+avx512bw" in has:
        return 16, "llvm.x86.avx512.pmaddw.d.512"
    if "+avx2" in has:
        return 8, "llvm.x86.avx2.pmadd.wd"
    return 4, "llvm.x86.sse2.pmadd.wd"


def _multiply(b: Any, sums: Any, x: Any, weight: Any, instruction: str) -> Any:
    """sums + the products of four unsigned bytes in each lane of x with four signed bytes in each lane of weight."""
    vector, lanes = sums.type, sums.type.count

    def call(of: Any, *args: Any) -> Any:
        kind = ir.FunctionType(vector, [of] * len(args))
        return b.call(cgutils.get_or_insert_function(b.module, kind, instruction), args)

    def constant(value: int, kind: Any = vector) -> Any:
        return ir.Constant(kind, [value] * kind.count)

    if "vpdpbusd" in instruction:
        return call(vector, sums, x, weight)
    if instruction:  # bytes 0 and 2, then 1 and 3, as pairs of 16 bits
        pairs = ir.VectorType(_I16, 2 * lanes)
        w = b.bitcast(weight, pairs)
        even, odd = b.ashr(b.shl(w, constant(8, pairs)), constant(8, pairs)), b.ashr(w, constant(8, pairs))
        low = b.bitcast(b.and_(x, constant(0x00FF00FF)), pairs)
        high = b.bitcast(b.and_(b.lshr(x, constant(8)), constant(0x00FF00FF)), pairs)
        return b.add(sums, b.add(call(pairs, low, even), call(pairs, high, odd)))
    for k in range(4):
        signed = b.ashr(b.shl(weight, constant(24 - 8 * k)), constant(24))
        sums = b.add(sums, b.mul(signed, b.and_(b.lshr(x, constant(8 * k)), constant(255))))
    return sums


def _tile(rows: int, units: int) -> Any:
    """A function that adds a product to sums of ``rows`` rows and ``units`` times 16 outputs, all held in registers.

    Its arguments are addresses and strides in bytes: x and its rows; weights and their step of four inputs; the number
    of such steps, at least 1; sums and their rows.
    """

    def build(b: Any, x: Any, x_row: Any, weight: Any, step: Any, steps: Any, sums: Any, sums_row: Any) -> None:
        lanes, instruction = _instructions()
        vector, vectors = ir.VectorType(_I32, lanes), units * UNIT // lanes

        def at(base: Any, *offsets: Any, kind: Any = vector) -> Any:
            for offset in offsets:
                base = b.add(base, offset)
            return b.inttoptr(base, kind.as_pointer())

        def times(value: Any, factor: int) -> Any:
            return b.mul(value, _I64(factor))

        out = [[at(sums, times(sums_row, r), _I64(4 * lanes * v)) for v in range(vectors)] for r in range(rows)]
        first = [[b.load(place, align=4) for place in row] for row in out]
        start, loop, end = b.block, b.append_basic_block("loop"), b.append_basic_block("end")
        b.branch(loop)
        b.position_at_end(loop)
        count = b.phi(_I64)
        total = [[b.phi(vector) for _ in row] for row in first]
        w = [b.load(at(weight, b.mul(step, count), _I64(4 * lanes * v)), align=1) for v in range(vectors)]
        added = []
        for r in range(rows):
            four = b.load(at(x, times(x_row, r), times(count, 4), kind=_I32), align=1)
            empty = ir.Constant(vector, ir.Undefined)
            same = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
            spread = b.shuffle_vector(b.insert_element(empty, four, _I32(0)), empty, same)
            added.append([_multiply(b, total[r][v], spread, w[v], instruction) for v in range(vectors)])
        following = b.add(count, _I64(1))
        count.add_incoming(_I64(0), start)
        count.add_incoming(following, loop)
        for r in range(rows):
            for v in range(vectors):
                total[r][v].add_incoming(first[r][v], start)
                total[r][v].add_incoming(added[r][v], loop)
        b.cbranch(b.icmp_signed("<", following, steps), loop, end)
        b.position_at_end(end)
        for r in range(rows):
            for v in range(vectors):
                b.store(added[r][v], out[r][v], align=4)

    @intrinsic
    def tile(context: Any, x: Any, x_row: Any, weight: Any, step: Any, steps: Any, sums: Any, sums_row: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            # A function of its own: without that, compiling takes several times as long.
            name = f"vqcodec_tile_{rows}_{units}"
            function = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), [_I64] * 7), name)
            if function.is_declaration:
                function.linkage = "linkonce_odr"
                function.attributes.add("noinline")
                body = ir.IRBuilder(function.append_basic_block("start"))
                build(body, *function.args)
                body.ret_void()
            b.call(function, args)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), generate

    return tile


# As many sums as registers hold: 16 of 32 with AVX-512, 8 of 16 otherwise.
ROWS, _UNITS = (8, 2) if _instructions()[0] == 16 else (4, 1)
_block, _edge = _tile(ROWS, _UNITS), _tile(ROWS, 1)
_row1, _row2, _row3, _row4 = (_tile(1, units) for units in (1, 2, 3, 4))


@intrinsic
def _load(context: Any, address: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.load_atomic(b.inttoptr(args[0], _I64.as_pointer()), "acquire", 8)

    return types.int64(types.intp), generate


@intrinsic
def _store(context: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        b.store_atomic(args[1], b.inttoptr(args[0], _I64.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), generate


@intrinsic
def clip(context: Any, x: Any, low: Any, high: Any) -> Any:
    """x within low..high, of x's type: min and max of numba would be compiled anew for each pair of types."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, low, high = args
        x = b.select(b.icmp_signed("<", x, low), low, x)
        return b.select(b.icmp_signed(">", x, high), high, x)

    return x(x, x, x), generate


@intrinsic
def _copy(context: Any, target: Any, source: Any, size: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        to, source, size = args
        cgutils.raw_memcpy(b, b.inttoptr(to, _POINTER), b.inttoptr(source, _POINTER), size, 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def _fill(context: Any, target: Any, size: Any, value: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        cgutils.memset(b, b.inttoptr(args[0], _POINTER), args[1], args[2])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.uint8), generate


if INTERPRETED:  # the same in Python, to look inside with a debugger

    def add_product(x, n, inputs, weight, at, outputs, sums, column):  # type: ignore[no-untyped-def]
        steps = -(-inputs // 4)
        layer = weight[at : at + steps * outputs * 4].reshape(steps, outputs, 4)[:, column:].astype(np.int64)
        sums[:n, column:outputs] += np.einsum("rsk,sok->ro", x[:n, : steps * 4].reshape(n, steps, 4).astype(int), layer)

    def clip(x, low, high):  # type: ignore[no-untyped-def, misc]
        return min(max(x, low), high)

    def copy(target, at, source, start, size):  # type: ignore[no-untyped-def]
        target[at : at + size] = source[start : start + size]

    def fill(target, at, size, value):  # type: ignore[no-untyped-def]
        target[at : at + size] = value

    def published(place):  # type: ignore[no-untyped-def]
        return place[0]

    def publish(place, value):  # type: ignore[no-untyped-def]
        place[0] = value

else:

    @_raising
    def add_product(x, n, inputs, weight, at, outputs, sums, column):  # type: ignore[no-untyped-def]
        """sums[:n, column : outputs] += x[:n, :inputs] times the layer whose weights begin at weight[at].

        x: (rows, width) uint8; sums: (rows, width) int32; weight: int8. inputs is rounded up to a multiple of 4,
        outputs and column are multiples of ``UNIT``. Rows behind n, up to a multiple of ``ROWS``, may be overwritten.
        IndexError before anything is read or written outside of the arrays.
        """
        steps = (inputs + 3) // 4
        if (
            min(n, at, inputs, column) < 0
            or steps * 4 > x.shape[1]
            or at + steps * outputs * 4 > len(weight)
            or n > min(len(x), len(sums))
            or outputs > sums.shape[1]
            or outputs % UNIT + column % UNIT
        ):
            raise IndexError("a product outside of its arrays")
        if steps == 0:
            return
        xs, ss, step = x.shape[1], 4 * sums.shape[1], 4 * outputs
        full = (n + ROWS - 3) // ROWS * ROWS  # three rows or more take a block, if there is memory for all of it
        if full > min(len(x), len(sums)):
            full -= ROWS
        for r in range(0, full, ROWS):
            xa, sa = x.ctypes.data + r * xs, sums.ctypes.data + r * ss
            o = column
            while o + _UNITS * UNIT <= outputs:
                _block(xa, xs, weight.ctypes.data + at + 4 * o, step, steps, sa + 4 * o, ss)
                o += _UNITS * UNIT
            if o < outputs:
                _edge(xa, xs, weight.ctypes.data + at + 4 * o, step, steps, sa + 4 * o, ss)
        for r in range(full, n):
            xa, sa = x.ctypes.data + r * xs, sums.ctypes.data + r * ss
            o = column
            while o < outputs:
                wa, oa, left = weight.ctypes.data + at + 4 * o, sa + 4 * o, (outputs - o) // UNIT
                if left >= 4:
                    _row4(xa, xs, wa, step, steps, oa, ss)
                elif left == 3:
                    _row3(xa, xs, wa, step, steps, oa, ss)
                elif left == 2:
                    _row2(xa, xs, wa, step, steps, oa, ss)
                else:
                    _row1(xa, xs, wa, step, steps, oa, ss)
                o += 4 * UNIT

    @_raising
    def copy(target, at, source, start, size):  # type: ignore[no-untyped-def]
        """target[at : at + size] = source[start : start + size], for bytes. IndexError where they are not there.

        A loop would be a hundred lines of vector code at every place that it is inlined to.
        """
        if min(at, start, size) < 0 or at + size > len(target) or start + size > len(source):
            raise IndexError("a copy outside of its arrays")
        _copy(target.ctypes.data + at, source.ctypes.data + start, size)

    @_raising
    def fill(target, at, size, value):  # type: ignore[no-untyped-def]
        """target[at : at + size] = value, for bytes. IndexError where they are not there."""
        if min(at, size) < 0 or at + size > len(target):
            raise IndexError("a fill outside of its array")
        _fill(target.ctypes.data + at, size, value)

    @inlined
    def published(place):  # type: ignore[no-untyped-def]
        """place[0] (int64) as another thread has last published it; what it wrote before that can be read now."""
        return _load(place.ctypes.data)

    @inlined
    def publish(place, value):  # type: ignore[no-untyped-def]
        """place[0] = value for other threads that read it with ``published``."""
        _store(place.ctypes.data, value)
