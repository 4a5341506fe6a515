"""Python pickles of plain data and NumPy arrays, read without running anything that they ask for.

A pickle is a program for a stack machine, and the usual machine lets it call any function. This one knows the few instructions that write
dictionaries, lists, tuples, strings, numbers and arrays; the five functions by which NumPy writes an array are *recognised by name*, never
looked up, and stand for what is done here. Anything else is refused. Nothing is allocated on a file's word: an array's bytes must be
in the file.
"""

import pickletools
from typing import Any, NamedTuple

import numpy as np

from hopjax.data.images import DataError

# A name that a pickle may mention → what it means here. NumPy 1 and 2, Python 2 and 3.
NAMES = {
    "numpy.core.multiarray _reconstruct": "array",
    "numpy._core.multiarray _reconstruct": "array",
    "numpy.core.numeric _frombuffer": "from buffer",
    "numpy._core.numeric _frombuffer": "from buffer",
    "numpy ndarray": "type of array",
    "numpy dtype": "dtype",
    "_codecs encode": "bytes",
}

LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# Instructions that push what follows them.
NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
STRINGS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"}
BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
PUSHED = NUMBERS | STRINGS | BYTES
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MARK = object()


class Name(NamedTuple):
    """A function that the pickle mentions: a value of `NAMES`, inert."""

    meaning: str


class Dtype:
    """A dtype under construction: its code, and the byte order that follows."""

    def __init__(self, code: object) -> None:
        # Whole numbers and floats only: an array of objects would hold pointers.
        if not isinstance(code, str) or code not in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"):
            named = repr(code[:20]) if isinstance(code, str) else "an unknown type"  # the repr of nested tuples can take forever
            raise DataError(f"the pickle holds an array of {named}: only numbers are read")
        self.dtype = np.dtype(code)

    def build(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("|", "<", ">", "="):
            raise DataError("the pickle holds an array of unknown byte order")
        self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """An array under construction: empty until its state follows."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def build(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise DataError("the pickle holds an array whose state is not understood")
        _, shape, dtype, fortran, raw = state
        self.value = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: object, dtype: object, shape: object, order: object) -> np.ndarray:
    if isinstance(raw, str):  # Python 2 wrote bytes as strings
        raw = raw.encode("latin-1")
    if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, Dtype) or order not in ("C", "F"):
        raise DataError("the pickle holds an array whose state is not understood")
    if not isinstance(shape, tuple) or len(shape) > 4 or not all(type(size) is int and 0 <= size <= len(raw) for size in shape):
        raise DataError("the pickle holds an array whose shape is no shape of images")
    values = np.frombuffer(raw, dtype.dtype)
    if values.size != int(np.prod(shape, dtype=object)):
        raise DataError(f"the pickle holds an array of shape {shape} but {values.size} values")
    return values.reshape(shape, order=order)


def _call(function: object, arguments: object) -> object:
    """What a call that the pickle asks for stands for."""
    match function, arguments:
        case Name("array"), (Name("type of array"), tuple(), _):
            return Array()
        case Name("dtype"), (code, *_):
            return Dtype(code)
        case Name("from buffer"), (raw, dtype, shape, order):
            array = Array()
            array.value = _array(raw, dtype, shape, order)
            return array
        case Name("bytes"), (str(text), "latin1" | "latin-1"):
            return text.encode("latin-1")
    raise DataError("the pickle asks for a call that reading images does not need: refused")


def _named(name: Any) -> Name:
    if name not in NAMES:
        raise DataError(
            f"the pickle asks for {name[:80].replace(' ', '.')!r}, which reading images does not need: refused, nothing was run"
        )
    return Name(NAMES[name])


def _insert(mapping: object, pairs: list[Any]) -> None:
    if not isinstance(mapping, dict) or len(pairs) % 2:
        raise DataError("the pickle's stack is broken")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if type(key) not in (str, bytes, int):  # the hash of nested tuples can take forever
            raise DataError("the pickle holds a dictionary with keys other than names")
        mapping[key] = value


def load(data: bytes) -> object:
    """The object that a pickle of protocol 2 to 5 describes: plain data, with `numpy.ndarray` for arrays at the first level of a dict.

    Strings of Python 2 are read as Latin-1.

    Raises: DataError for anything but plain data and arrays of numbers, or a file that is broken.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        at = len(stack) - 1 - next(i for i, item in enumerate(reversed(stack)) if item is MARK)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    try:
        for opcode, argument, _ in pickletools.genops(data):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case name if name in PUSHED:
                    stack.append(argument)
                case name if name in LITERALS:
                    stack.append(LITERALS[name])
                case name if name in TUPLES:
                    size = TUPLES[name]
                    items = [stack.pop() for _ in range(size)]
                    stack.append(tuple(reversed(items)))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "MARK":
                    stack.append(MARK)
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "APPEND":
                    item = stack.pop()
                    _list(stack).append(item)
                case "APPENDS":
                    items = since_mark()
                    _list(stack).extend(items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _insert(stack[-1], [key, value])
                case "SETITEMS":
                    items = since_mark()
                    _insert(stack[-1], items)
                case "GLOBAL":
                    stack.append(_named(argument))
                case "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    stack.append(_named(f"{module:.60} {attribute:.60}"))
                case "REDUCE":
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(_call(function, arguments))
                case "BUILD":
                    state = stack.pop()
                    if not isinstance(stack[-1], Array | Dtype):
                        raise DataError("the pickle sets attributes of something other than an array: refused")
                    stack[-1].build(state)
                case "STOP":
                    result = stack.pop()
                    return {key: _value(item) for key, item in result.items()} if isinstance(result, dict) else _value(result)
                case name:
                    raise DataError(
                        f"the pickle holds the instruction {name}, which reading images does not need: refused, nothing was run"
                    )
    except DataError:
        raise
    except Exception as error:  # a broken program: an empty stack, a missing memo, bytes that are no instruction
        raise DataError(f"the pickle is broken or cut short: {str(error)[:80] or type(error).__name__}") from None
    raise DataError("the pickle is cut short")


def _list(stack: list[Any]) -> list[Any]:
    if not isinstance(stack[-1], list):
        raise DataError("the pickle's stack is broken")
    return stack[-1]


def _value(item: object) -> object:
    return item.value if isinstance(item, Array) else item
