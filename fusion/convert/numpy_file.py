"""Reads arrays from `.npy` files, without executing anything in them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from fusion.convert import safe_pickle
from fusion.errors import DataError


def read_npy(path: Path, name: str) -> object:
    """Reads the array at `path`. Numbers and text are memory-mapped; an array of Python objects becomes a list.

    numpy.save pickles arrays of Python objects, such as ids from pandas. These are parsed as data (see
    fusion.convert.safe_pickle).

    Args:
        name: of the file, for messages.

    Raises:
        DataError: the file is not a complete .npy file, or contains objects that are not plain data.
    """
    if zipfile.is_zipfile(path):
        raise _archive(path, name)
    try:
        return np.lib.format.open_memmap(path, mode="r")  # unlike np.load, it never unpickles
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
