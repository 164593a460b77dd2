"""A pickle machine for data: it runs no code, and its memory is bounded by the pickle's length.

It knows the opcodes that `pickle.dumps` (protocols 2 to 5) emits for numbers, strings, lists, dicts
and tuples, and for objects of the classes that its caller names. A class or function is never
handed out: the caller gives a `Factory`, which checks what it is asked to make. What could cost
more than the pickle's own length is refused: a list, dict or nested tuple that is referred to twice
(which can unfold to 2^n elements), keys that are not strings or integers, memo indices out of
order, and deep nesting.
"""

import pickle
import struct
from collections.abc import Callable
from typing import Any

from flame.unpickling.values import Factory, RefusedError

MAX_DEPTH = 32
"""Containers inside each other."""
MAX_TUPLE = 1024
"""Elements of a tuple."""
_BYTES_PER_CONTAINER = 6
"""What `pickle.dumps` needs at least, on average, for an object, a list or a dict."""
_CONTAINERS = (tuple, list, dict)

_STOP = pickle.STOP[0]
_CONSTANTS = {
    pickle.NONE[0]: None,
    pickle.NEWTRUE[0]: True,
    pickle.NEWFALSE[0]: False,
    pickle.EMPTY_TUPLE[0]: (),
}
_HANDLERS: dict[int, tuple[Callable[..., None], tuple[Any, ...]]] = {}
"""By opcode, the method that obeys it and the arguments beside the machine."""


def _obeys(opcode: bytes, *arguments: Any) -> Callable[[Callable[..., None]], Any]:
    """Register a method of the machine for an opcode."""

    def register(method: Callable[..., None]) -> Callable[..., None]:
        _HANDLERS[opcode[0]] = (method, arguments)
        return method

    return register


class PlainUnpickler:
    """Reads one pickle.

    Args:
        content: the pickle.
        find_global: returns a Factory, or a constant, for a module and a name; raises RefusedError.
        find_persistent: returns the value of a persistent id; None if there must be none.
        keys: types of dict keys beside strings and integers; their hash must be cheap.
    """

    def __init__(
        self,
        content: bytes,
        find_global: Callable[[str, str], Any],
        find_persistent: Callable[[Any], Any] | None = None,
        keys: tuple[type, ...] = (),
    ) -> None:
        self._data, self._position = content, 0
        self._find_global, self._find_persistent = find_global, find_persistent
        self._keys = (str, int, *keys)
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: list[Any] = []
        self._memoized: set[int] = set()
        """Ids of the containers in the memo."""
        self._once: set[int] = set()
        """Ids of those that the pickle must not refer to again."""
        self._fills: dict[int, tuple[Any, Any]] = {}
        """Objects without their state, by id, and what gives it."""
        self._containers = 1000 + len(content) // _BYTES_PER_CONTAINER

    def load(self) -> Any:
        """Return the pickled value; raise RefusedError if it cannot be read."""
        try:
            while (opcode := self._data[self._position]) != _STOP:
                self._position += 1
                if opcode in _CONSTANTS:
                    self._stack.append(_CONSTANTS[opcode])
                    continue
                if opcode not in _HANDLERS:
                    raise RefusedError(f"opcode {opcode:#04x} is no part of plain data")
                method, arguments = _HANDLERS[opcode]
                method(self, *arguments)
            if self._below or len(self._stack) != 1:
                raise IndexError
        except (IndexError, struct.error):
            raise RefusedError("the pickle is cut short or damaged") from None
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise RefusedError(f"the pickle is damaged: {error}") from None
        return self._stack[0]

    def _take(self, size: int) -> bytes:
        begin, self._position = self._position, self._position + size
        if self._position > len(self._data):
            raise IndexError
        return self._data[begin : self._position]

    def _unsigned(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _pop(self, size: int | None) -> list[Any]:
        """Take the upper `size` values, or all down to the mark, from the stack."""
        if size is None:
            items, self._stack = self._stack, self._below.pop()
        elif len(self._stack) < size:
            raise IndexError
        else:
            items = self._stack[-size:]
            del self._stack[-size:]
        return items

    def _count_container(self) -> None:
        self._containers -= 1
        if self._containers < 0:
            raise RefusedError("the pickle holds more containers than pickle.dumps would write")

    @_obeys(pickle.PROTO, 1)
    @_obeys(pickle.FRAME, 8)
    def _skip(self, size: int) -> None:
        self._take(size)

    @_obeys(pickle.SHORT_BINUNICODE, 1)
    @_obeys(pickle.BINUNICODE, 4)
    def _string(self, length_bytes: int) -> None:
        self._stack.append(self._take(self._unsigned(length_bytes)).decode())

    @_obeys(pickle.BININT, 4, True)
    @_obeys(pickle.BININT1, 1, False)
    @_obeys(pickle.BININT2, 2, False)
    @_obeys(pickle.LONG1, None, True)
    def _integer(self, size: int | None, signed: bool) -> None:
        size = self._unsigned(1) if size is None else size
        if size > 8:
            raise RefusedError("the pickle holds an integer of more than 64 bits")
        self._stack.append(int.from_bytes(self._take(size), "little", signed=signed))

    @_obeys(pickle.BINFLOAT)
    def _float(self) -> None:
        self._stack += struct.unpack(">d", self._take(8))

    @_obeys(pickle.MARK)
    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []
        if len(self._below) > MAX_DEPTH:
            raise RefusedError(f"the pickle is nested more than {MAX_DEPTH} deep")

    @_obeys(pickle.EMPTY_LIST, list)
    @_obeys(pickle.EMPTY_DICT, dict)
    def _empty(self, kind: type) -> None:
        self._count_container()
        self._stack.append(kind())

    @_obeys(pickle.TUPLE, None)
    @_obeys(pickle.TUPLE1, 1)
    @_obeys(pickle.TUPLE2, 2)
    @_obeys(pickle.TUPLE3, 3)
    def _tuple(self, size: int | None) -> None:
        items = self._pop(size)
        if len(items) > MAX_TUPLE:
            raise RefusedError(f"the pickle has a tuple of more than {MAX_TUPLE} elements")
        self._stack.append(tuple(items))

    @_obeys(pickle.APPEND, 1)
    @_obeys(pickle.APPENDS, None)
    def _extend(self, size: int | None) -> None:
        items = self._pop(size)
        if type(self._stack[-1]) is not list:
            raise RefusedError("the pickle appends to what is no list")
        self._stack[-1].extend(items)

    @_obeys(pickle.SETITEM, 2)
    @_obeys(pickle.SETITEMS, None)
    def _set_items(self, size: int | None) -> None:
        items = self._pop(size)
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise RefusedError("the pickle sets items of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in self._keys:
                raise RefusedError(f"the pickle has a {type(key).__name__} as a key")
            target[key] = value

    @_obeys(pickle.MEMOIZE, 0)
    @_obeys(pickle.BINPUT, 1)
    @_obeys(pickle.LONG_BINPUT, 4)
    def _put(self, size: int) -> None:
        if size and self._unsigned(size) != len(self._memo):
            raise RefusedError("the pickle's memo is out of order")
        value = self._stack[-1]
        if type(value) in _CONTAINERS and value != ():
            if id(value) in self._memoized:
                raise RefusedError("the pickle memoizes a value twice")
            self._memoized.add(id(value))
            if type(value) is not tuple or any(type(item) in _CONTAINERS for item in value):
                self._once.add(id(value))
        self._memo.append(value)

    @_obeys(pickle.BINGET, 1)
    @_obeys(pickle.LONG_BINGET, 4)
    def _get(self, size: int) -> None:
        self._stack.append(self._memo[self._unsigned(size)])
        if id(self._stack[-1]) in self._once:
            raise RefusedError("the pickle refers to a list, a dict or a nested tuple twice")

    @_obeys(pickle.GLOBAL)
    def _global(self) -> None:
        module, name, _ = self._data[self._position : self._position + 512].split(b"\n", 2)
        self._position += len(module) + len(name) + 2
        self._stack.append(self._find_global(module.decode(), name.decode()))

    @_obeys(pickle.STACK_GLOBAL)
    def _stack_global(self) -> None:
        module, name = self._pop(2)
        if type(name) is not str or type(module) is not str:
            raise RefusedError("the pickle names a class by what is no string")
        self._stack.append(self._find_global(module, name))

    @_obeys(pickle.REDUCE, "call")
    @_obeys(pickle.NEWOBJ, "new")
    def _make(self, how: str) -> None:
        self._count_container()
        factory, arguments = self._pop(2)
        make = getattr(factory, how) if type(factory) is Factory else None
        if make is None or type(arguments) is not tuple:
            raise RefusedError("the pickle calls what is no class or function")
        made = make(*arguments)
        self._stack.append(made)
        if how == "new":
            self._fills[id(made)] = (made, factory.fill)

    @_obeys(pickle.BUILD)
    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        _, fill = self._fills.pop(id(target), (None, None))
        if fill is None:
            raise RefusedError("the pickle sets the state of what is no fresh object")
        fill(target, state)

    @_obeys(pickle.BINPERSID)
    def _persistent(self) -> None:
        if self._find_persistent is None:
            raise RefusedError("the pickle refers to what lies outside it")
        self._stack.append(self._find_persistent(self._stack.pop()))
