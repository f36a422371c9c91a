"""Reads the data in a pickle, or in a file of torch.save, without executing anything in it.

A pickle is a program that names callables and calls them with arguments. This module only allows the names in a table.
The table does not contain the callables of numpy and torch themselves, but stand-ins that are written in this file and
only accept plain numbers and text. So a name outside the table is refused, and so is a forged dtype, shape, stride or
state, which could make numpy or torch access memory outside an array.
"""

from __future__ import annotations

import io
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from fusion.errors import DataError

_TORCH_MAGIC: Final = 0x1950A86A20F9469CFC6C  # the first object in a file of torch.save before its zip format
_REMEDY: Final = (
    "save it again where it was made, with a dict of plain arrays: "
    "pickle.dump({'embeddings': np.stack(rows), 'sample_ids': list(ids)}, file)"
)
_ALLOWED_IN_WORDS: Final = (
    "allowed are numbers, text, lists, dicts, torch tensors and, except in files of torch.save, numpy arrays"
)
_ZIP_MAGIC: Final = b"PK\x03\x04"
_TORCH_REFUSAL: Final = re.compile(r"GLOBAL ([\w.]+)|Unsupported (operand \d+)")
_CODECS: Final = frozenset({"latin1", "latin-1", "iso-8859-1"})
_PLAIN_DTYPE: Final = re.compile(r"[biu][1248]|f[248]|[US]\d{1,6}|O8?")


class _Inert:
    """Base class that refuses BUILD, the opcode that sets attributes of an object or calls its `__setstate__`."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise ValueError("a state for an object that has no state")


class _Call(_Inert):
    """A stand-in for a callable. A pickle can reach no other objects that can be called."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *args: object) -> object:
        return self._function(*args)


class _Dtype(_Inert):
    """Stand-in for numpy.dtype that only allows numbers and fixed-width text.

    numpy.dtype itself would accept forged sizes, offsets and flags.
    """

    __slots__ = ("value",)

    def __init__(self, code: object, align: object = False, copy: object = False) -> None:
        if not isinstance(code, str) or not _PLAIN_DTYPE.fullmatch(code):
            raise ValueError(f"dtype {code!r}")
        self.value = np.dtype(code)

    def __setstate__(self, state: object) -> None:
        _, order, *structure = _as_tuple(state)
        if order not in ("<", ">", "|", "=") or any(part is not None for part in structure[:3]):
            raise ValueError("a dtype with fields")
        self.value = self.value.newbyteorder(order)


class PickledArray(_Inert):
    """Stand-in for an array or tensor; `unwrap` returns its content."""

    __slots__ = ("value",)

    def __init__(self, value: NDArray[Any] | list[object] | None = None) -> None:
        self.value = value

    def __setstate__(self, state: object) -> None:
        if self.value is not None:
            raise ValueError("an array with two states")
        shape, dtype, is_fortran, data = _as_tuple(state)[-4:]  # before these comes a version, except in old files
        if isinstance(data, list):
            self.value = _object_list(data, shape)
        else:
            self.value = _from_bytes(data, dtype, shape, "F" if is_fortran else "C")


def _as_tuple(value: object) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        raise ValueError(f"expected a tuple, found {type(value).__name__}")
    return value


def _plain_dtype(dtype: object) -> np.dtype[Any]:
    if not isinstance(dtype, _Dtype) or dtype.value.hasobject:
        raise ValueError("bytes cannot hold Python objects")
    return dtype.value


def _object_list(data: list[object], shape: object) -> list[object]:
    if shape != (len(data),):
        raise ValueError(f"object array of shape {shape}, expected one dimension")
    return data


def _from_bytes(data: Any, dtype: object, shape: object, order: Any, axes: object = None) -> NDArray[Any]:
    """The array in `data`. numpy checks that the number of bytes fits dtype and shape."""
    flat: NDArray[Any] = np.frombuffer(data, dtype=_plain_dtype(dtype))
    if order == "K" and axes is not None:
        return flat.reshape(_as_tuple(shape)).transpose(_as_tuple(axes))
    return flat.reshape(_as_tuple(shape), order=order)


def _frombuffer(*args: Any) -> PickledArray:
    return PickledArray(_from_bytes(*args))


def _reconstruct(subtype: object, *_: object) -> PickledArray:
    if subtype != "numpy.ndarray":
        raise ValueError("an array that is not a numpy.ndarray")
    return PickledArray()  # its content follows as a state, by BUILD


def _scalar(dtype: object, data: bytes) -> object:
    if not data:  # a pickle of np.str_("") has text of width 0, which numpy does not support
        return ""
    return np.frombuffer(data, dtype=_plain_dtype(dtype), count=1)[0].item()


def _encode(text: object, codec: object) -> bytes:
    if not isinstance(text, str) or codec not in _CODECS:
        raise ValueError(f"_codecs.encode with codec {codec!r}, expected latin1")
    return text.encode("latin1")


def _load_storage(data: bytes) -> PickledArray:
    """The numbers of a torch storage. torch's own version of this function would unpickle `data` without limits."""
    import torch

    storage = _load_torch(io.BytesIO(data))
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ValueError(f"expected the storage of a tensor, found {type(storage).__name__}")
    return PickledArray(_tensor_to_numpy(torch.empty(0, dtype=storage.dtype).set_(storage)))


def _rebuild_tensor(storage: object, offset: int, size: object, stride: object, *_: object) -> PickledArray:
    """A view of the storage. Size and stride come from the file, so this checks that they stay within the storage."""
    if not isinstance(storage, PickledArray) or not isinstance(storage.value, np.ndarray) or storage.value.ndim != 1:
        raise ValueError("a tensor without storage")
    flat, sizes, strides = storage.value, _as_tuple(size), _as_tuple(stride)
    if len(sizes) != len(strides) or any(n < 0 for n in (offset, *sizes, *strides)):
        raise ValueError(f"a tensor of size {sizes} with stride {strides}")
    end = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) + 1
    if 0 in sizes:
        return PickledArray(np.empty(sizes, flat.dtype))
    if end > len(flat):
        raise ValueError(f"a tensor that needs {end} numbers of a storage of {len(flat)}")
    in_bytes = [step * flat.itemsize for step in strides]
    return PickledArray(np.lib.stride_tricks.as_strided(flat[offset:], sizes, in_bytes, writeable=False))


def _tensor_to_numpy(tensor: Any) -> NDArray[Any]:
    import torch

    if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16, and float32 holds each of its values
        tensor = tensor.float()
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array


def _table() -> Mapping[tuple[str, str], object]:
    """The names that a pickle may use, with their stand-ins.

    A stand-in that is a text can be passed as an argument, but can neither be called nor get attributes.
    """
    table: dict[tuple[str, str], object] = {
        ("numpy", "ndarray"): "numpy.ndarray",
        ("numpy", "dtype"): _Call(_Dtype),
        ("_codecs", "encode"): _Call(_encode),
        ("__builtin__", "bytes"): _Call(lambda: b""),  # in protocols 0 to 2, this call stands for b""
        ("collections", "OrderedDict"): _Call(lambda: {}),
        ("torch.storage", "_load_from_bytes"): _Call(_load_storage),
        ("torch._utils", "_rebuild_tensor"): _Call(_rebuild_tensor),
        ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor),
        ("torch._utils", "_rebuild_parameter"): _Call(lambda tensor, *_: tensor),
        ("torch", "Size"): _Call(_as_tuple),
        ("torch", "device"): _Call(lambda *parts: str(parts)),
    }
    for core in ("numpy.core", "numpy._core"):  # before and since numpy 2
        table[f"{core}.multiarray", "_reconstruct"] = _Call(_reconstruct)
        table[f"{core}.multiarray", "scalar"] = _Call(_scalar)
        table[f"{core}.numeric", "_frombuffer"] = _Call(_frombuffer)
    for name in ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8"):
        table["torch", name] = f"torch.{name}"
    return MappingProxyType(table)


ALLOWED: Final = _table()


class _RefusedError(ValueError):
    """A pickle contains a name, `module.name`, that is not in the table."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        """The stand-in for `module.name`. Protocol 4 allows dotted names, but here each is one key of the table."""
        if (module, name) not in ALLOWED:
            raise _RefusedError(f"{module}.{name}")
        return ALLOWED[module, name]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no details').splitlines()[0]}"


def _load_torch(source: Path | BinaryIO) -> Any:
    """Reads a file of torch.save with torch's `weights_only` unpickler, which has a similar table."""
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # it warns about pickle protocols other than torch.save's
            return torch.load(source, weights_only=True, map_location="cpu")
    except Exception as error:
        refused = _TORCH_REFUSAL.search(str(error))
        if refused:
            raise _RefusedError(refused[1] or refused[2]) from None
        raise ValueError(f"torch.load: {_first_line(error)}") from None


def _load(path: Path) -> object:
    with path.open("rb") as file:
        if file.read(4) == _ZIP_MAGIC:
            return _load_torch(path)
        file.seek(0)
        root: object = _Unpickler(file).load()
    return _load_torch(path) if root == _TORCH_MAGIC else root


def load(path: Path, name: str) -> object:
    """The object in the pickle at `path`, with a `PickledArray` for each array. `name` is the file's name in errors.

    Raises:
        DataError: the file is not a pickle, is truncated, or contains anything but plain data.
    """
    return _as_data(lambda: _load(path), name)


def load_objects(path: Path, name: str) -> object:
    """As `load`, for an array of Python objects that numpy.save wrote: a header followed by a pickle."""

    def read() -> object:
        with path.open("rb") as file:
            major, _ = np.lib.format.read_magic(file)
            if major == 1:
                np.lib.format.read_array_header_1_0(file)
            else:
                np.lib.format.read_array_header_2_0(file)
            return unwrap(_Unpickler(file).load(), name)

    return _as_data(read, name)


def _as_data(read: Callable[[], object], name: str) -> object:
    try:
        return read()
    except _RefusedError as error:
        raise DataError(f"{name} asks for {error}, which is not data; {_ALLOWED_IN_WORDS}", _REMEDY) from None
    except Exception as error:  # damaged bytes can be any opcode, so any kind of error may follow
        raise DataError(f"{name} is not a readable pickle of data ({_first_line(error)})", _REMEDY) from None


def unwrap(value: object, name: str) -> object:
    """The numpy array (or the list, for an array of objects) in a `PickledArray` or tensor; other values unchanged.

    Raises:
        DataError: a tensor cannot be converted, such as a sparse one; names it `name`.
    """
    if isinstance(value, PickledArray):
        return value.value
    torch = sys.modules.get("torch")  # if torch has not been imported, the value cannot be a tensor
    if torch is None or not isinstance(value, torch.Tensor):
        return value
    try:
        return _tensor_to_numpy(value)
    except (TypeError, RuntimeError) as error:
        raise DataError(f"{name} is not a plain tensor ({_first_line(error)})", _REMEDY) from None
