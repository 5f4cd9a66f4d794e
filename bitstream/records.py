"""Records for kernels: NamedTuples of arrays and numbers that cost a kernel one address.

numba passes a tuple by value, array by array, field by field, and compiles its copies for longer than all the rest of a
kernel. ``pack`` writes where the arrays lie, their shapes, and the numbers, into a block of memory, and a kernel
loads from there what it asks for: ``record.field`` reads the same in Python and in a kernel.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import NativeValue, models, register_model, typeof_impl, unbox
from numba.np import numpy_support
from numba.np.arrayobj import make_array, populate_array

from bitstream.products import INTERPRETED

_NUMBERS = {int: types.int64, float: types.float64, bool: types.boolean}
_I64 = ir.IntType(64)


class RecordType(types.Type):
    """What numba knows of a record: its fields' types, in order."""

    def __init__(self, name: str, fields: Sequence[tuple[str, Any]]) -> None:
        super().__init__(name=name)
        self.fields = tuple(fields)


@functools.cache
def type_of(record: type) -> RecordType:
    """By its annotations: int, float, bool, or Annotated[Any, dtype, dimensions]."""
    fields = []
    for name, hint in get_type_hints(record, include_extras=True).items():
        if hint in _NUMBERS:
            kind: Any = _NUMBERS[hint]
        else:
            _, dtype, dimensions = get_args(hint)
            kind = types.Array(numpy_support.from_dtype(np.dtype(dtype)), dimensions, "C")
        fields.append((name, kind))
    return RecordType(record.__name__, fields)


class Packed:
    """A record as kernels take it. Keeps its arrays alive; other arrays in its place need another one."""

    def __init__(self, record: NamedTuple) -> None:
        """TypeError for arrays of other types than the annotations say, or not in C order."""
        self.record = record
        self.type = type_of(type(record))
        block: list[int] = []
        for value, (name, kind) in zip(record, self.type.fields, strict=True):
            if isinstance(kind, types.Array):
                dtype = numpy_support.as_dtype(kind.dtype)
                if value.dtype != dtype or value.ndim != kind.ndim or not value.flags.c_contiguous:
                    found = f"{value.dtype} of {value.ndim} dimensions, strides {value.strides}"
                    raise TypeError(f"{self.type.name}.{name} is {found}, not {kind}")
                block += [value.__array_interface__["data"][0], *value.shape]
            else:
                block.append(int(np.float64(value).view(np.int64)) if kind is types.float64 else int(value))
        self.block = np.array(block, np.int64)
        self.address = self.block.__array_interface__["data"][0]


def pack(record: Any) -> Any:
    """What a kernel takes for a record."""
    return record if INTERPRETED else Packed(record)


@typeof_impl.register(Packed)
def _typeof(value: Packed, context: Any) -> RecordType:
    return value.type


@register_model(RecordType)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: RecordType) -> None:
        super().__init__(manager, kind, _I64.as_pointer())


@unbox(RecordType)
def _unbox(kind: RecordType, value: Any, c: Any) -> NativeValue:
    number = c.pyapi.object_getattr_string(value, "address")
    address = c.pyapi.long_as_longlong(number)
    c.pyapi.decref(number)
    return NativeValue(c.builder.inttoptr(address, _I64.as_pointer()))


@infer_getattr
class _Attributes(AttributeTemplate):
    key = RecordType

    def generic_resolve(self, kind: RecordType, name: str) -> Any:  # type: ignore[override]
        return dict(kind.fields).get(name)


@lower_getattr_generic(RecordType)
def _get(context: Any, b: Any, kind: RecordType, block: Any, name: str) -> Any:
    place = 0
    for other, field in kind.fields:
        if other == name:
            break
        place += 1 + (field.ndim if isinstance(field, types.Array) else 0)

    def load(offset: int) -> Any:
        value = b.load(b.gep(block, [ir.Constant(_I64, place + offset)]))
        value.set_metadata("invariant.load", b.module.add_metadata([]))  # nobody writes to a block
        return value

    number = load(0)
    if field is types.float64:
        return b.bitcast(number, ir.DoubleType())
    if field is types.boolean:
        return b.icmp_unsigned("!=", number, ir.Constant(_I64, 0))
    if field is types.int64:
        return number
    size = context.get_abi_sizeof(context.get_data_type(field.dtype))
    shape = [load(1 + k) for k in range(field.ndim)]
    strides = [ir.Constant(_I64, size)]
    for length in reversed(shape[1:]):
        strides.insert(0, b.mul(length, strides[0]))
    array = make_array(field)(context, b)
    data = b.inttoptr(number, context.get_data_type(field.dtype).as_pointer())
    populate_array(array, data, cgutils.pack_array(b, shape), cgutils.pack_array(b, strides), size, None)
    return array._getvalue()
