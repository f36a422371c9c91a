"""Arrays in `.npy` files, read without executing anything."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from fusion.convert import safe_pickle
from fusion.errors import DataError


def read_npy(path: Path, name: str) -> object:
    """The array at `path`: numbers and text mapped into memory, Python objects as a list; errors call it `name`.

    pandas has ids as Python objects, which numpy.save pickles. They are read as data (see fusion.convert.safe_pickle).

    Raises:
        DataError: it is not a complete .npy file, or its objects are not data.
    """
    if zipfile.is_zipfile(path):
        raise _archive(path, name)
    try:
        return np.lib.format.open_memmap(path, mode="r")  # unlike np.load, it has no way to unpickle
    except (ValueError, EOFError, OSError, OverflowError) as error:
        if "Python objects" in str(error):
            return safe_pickle.load_objects(path, name)
        raise DataError(f"{name} is not a complete .npy file ({error})", "copy or make the file again") from None


def _archive(path: Path, name: str) -> DataError:
    with zipfile.ZipFile(path) as archive:
        arrays = [member.removesuffix(".npy") for member in archive.namelist()]
    first = arrays[0] if arrays else "NAME"
    return DataError(
        f"{name} is an .npz archive of the arrays {arrays[:9]}, expected one array in one .npy file",
        f"save each array by itself: np.save('{first}.npy', np.load('{name}')['{first}'])",
    )
