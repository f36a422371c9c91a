from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fusion.convert import safe_pickle
from fusion.convert.__main__ import main
from fusion.convert.arrays import ROW_GROUP
from fusion.errors import DataError

VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3) / 8
IDS = [7, 3, 12, 5]
PROTOCOLS = (0, 2, 4, 5)  # 1 and 3 treat arrays like 0 and 2


def converted(target: Path) -> tuple[list[int | str], np.ndarray[Any, Any]]:
    table = pq.read_table(target)
    column = table["embedding"].combine_chunks()
    width = column.type.list_size
    return table["sample_id"].to_pylist(), column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)


def convert_npy(folder: Path, vectors: Any, ids: Any) -> Path:
    np.save(folder / "embeddings.npy", vectors)
    np.save(folder / "ids.npy", ids)
    assert run_npy(folder) == 0
    return folder / "out" / "source.parquet"


def run_npy(folder: Path) -> int:
    names = [str(folder / name) for name in ("embeddings.npy", "ids.npy", "out/source.parquet")]
    return main(["--embeddings", names[0], "--ids", names[1], "--to", names[2]])


def convert_pickle(folder: Path, content: object, protocol: int = 4) -> Path:
    (folder / "in.pkl").write_bytes(pickle.dumps(content, protocol))
    assert run_pickle(folder) == 0
    return folder / "source.parquet"


def run_pickle(folder: Path) -> int:
    return main(["--pickle", str(folder / "in.pkl"), "--to", str(folder / "source.parquet")])


def refused(folder: Path, content: object, protocol: int = 4) -> None:
    raw = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
    (folder / "in.pkl").write_bytes(raw)
    assert run_pickle(folder) == 65
    assert [file.name for file in folder.iterdir()] == ["in.pkl"], "neither output nor a trace of the payload"


# Round trips


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("f2", "halffloat"), ("f4", "float"), ("f8", "float"), (">f4", "float"), (">f2", "halffloat"), ("i1", "float")],
)
def test_npy_pair_keeps_values_and_halves(tmp_path: Path, dtype: str, stored: str) -> None:
    target = convert_npy(tmp_path, (VECTORS * 8).astype(dtype), np.array(IDS))
    ids, values = converted(target)
    assert ids == IDS
    assert np.array_equal(values, VECTORS * 8)
    assert str(pq.read_schema(target).field("embedding").type.value_type) == stored


@pytest.mark.parametrize("ids", [["a", "bb", "c", "007"], [7, 3, 12, 5], [np.int64(1), 2, 3, 4]], ids=str)
def test_npy_ids_that_pandas_saved_as_objects(tmp_path: Path, ids: list[object]) -> None:
    assert converted(convert_npy(tmp_path, VECTORS, np.array(ids, dtype=object)))[0] == ids


def test_npy_ids_that_are_objects_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "embeddings.npy", VECTORS)
    for ids in ([None, 2, 3, 4], [1.5, 2, 3, 4], ["a", 2, 3, 4]):
        np.save(tmp_path / "ids.npy", np.array(ids, dtype=object))
        assert run_npy(tmp_path) == 65
        assert "expected only integers or only text" in capsys.readouterr().err


def test_npy_vectors_that_are_objects(tmp_path: Path) -> None:
    rows = np.empty(4, dtype=object)
    rows[:] = list(VECTORS)
    ids, values = converted(convert_npy(tmp_path, rows, np.array(IDS)))
    assert ids == IDS
    assert np.array_equal(values, VECTORS)


def test_npz_error_explains_how_to_extract_npy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "embeddings.npz", vectors=VECTORS)
    (tmp_path / "embeddings.npz").rename(tmp_path / "embeddings.npy")
    np.save(tmp_path / "ids.npy", np.array(IDS))
    assert run_npy(tmp_path) == 65
    said = capsys.readouterr().err
    assert "is an .npz archive of the arrays ['vectors']" in said
    assert "np.save('vectors.npy', np.load(" in said
    assert "['vectors'])" in said


@pytest.mark.parametrize("kind", ["U2", "S2"])
def test_npy_text_ids(tmp_path: Path, kind: str) -> None:
    assert converted(convert_npy(tmp_path, VECTORS, np.array(["a", "bb", "c", "7"], kind)))[0] == ["a", "bb", "c", "7"]


def test_npy_in_fortran_order_with_a_column_of_unsigned_ids(tmp_path: Path) -> None:
    ids, values = converted(convert_npy(tmp_path, np.asfortranarray(VECTORS), np.array(IDS, ">u8").reshape(-1, 1)))
    assert ids == IDS
    assert np.array_equal(values, VECTORS)


def test_row_groups_are_whole_and_uncompressed(tmp_path: Path) -> None:
    n_rows = 2 * ROW_GROUP + 5
    vectors = np.arange(n_rows * 2, dtype=np.float32).reshape(-1, 2)
    target = convert_npy(tmp_path, vectors, np.arange(n_rows))
    meta = pq.read_metadata(target)
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [ROW_GROUP, ROW_GROUP, 5]
    assert meta.row_group(0).column(1).compression == "UNCOMPRESSED"
    assert not meta.row_group(0).column(1).has_dictionary_page
    assert np.array_equal(converted(target)[1], vectors)


def test_reports_what_was_written_and_leaves_no_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = convert_npy(tmp_path, VECTORS, np.array(IDS))
    assert capsys.readouterr().out == f"wrote 4 rows of 3 float32 to {target}\n"
    assert list(target.parent.iterdir()) == [target]


def test_stores_in_and_out(tmp_path: Path) -> None:
    with fsspec.open("memory://convert/in.pkl", "wb") as file:
        pickle.dump({"embeddings": VECTORS, "sample_ids": IDS}, file)
    assert main(["--pickle", "memory://convert/in.pkl", "--to", "memory://convert/out/a.parquet"]) == 0
    with fsspec.open("memory://convert/out/a.parquet", "rb") as file:
        (tmp_path / "copy.parquet").write_bytes(file.read())
    assert converted(tmp_path / "copy.parquet")[0] == IDS


LAYOUTS: dict[str, Any] = {
    "array": VECTORS,
    "fortran": np.asfortranarray(VECTORS),
    "slice": np.repeat(VECTORS, 2, axis=0)[::2],
    "big endian": VECTORS.astype(">f4"),
    "objects": np.array([*map(tuple, VECTORS.tolist()), None], dtype=object)[:4],
    "arrays": list(VECTORS),
    "batches": [VECTORS[:3], VECTORS[3:]],
    "lists": VECTORS.tolist(),
    "scalars": [list(row) for row in VECTORS],
    "tensor": torch.tensor(VECTORS),
    "transposed tensor": torch.tensor(VECTORS.T.copy()).T,
    "tensor slice": torch.tensor(np.repeat(VECTORS, 2, axis=1))[:, ::2],
    "parameter": torch.nn.Parameter(torch.tensor(VECTORS)),
    "bfloat16": torch.tensor(VECTORS, dtype=torch.bfloat16),
    "tensors": list(torch.tensor(VECTORS)),
    "dict": OrderedDict(zip(reversed(IDS), reversed(list(torch.tensor(VECTORS))), strict=True)),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pickle_layouts(tmp_path: Path, layout: str, protocol: int) -> None:
    ids, values = converted(convert_pickle(tmp_path, {"embeddings": LAYOUTS[layout], "sample_ids": IDS}, protocol))
    assert ids == IDS
    assert np.array_equal(values, VECTORS)


ID_LAYOUTS: dict[str, tuple[Any, list[int | str]]] = {
    "array": (np.array(IDS), list(IDS)),
    "text array": (np.array(["a", "bb", "c", "ddd"]), ["a", "bb", "c", "ddd"]),
    "object array": (np.array(["a", "bb", "c", "ddd"], dtype=object), ["a", "bb", "c", "ddd"]),
    "tensor": (torch.tensor(IDS), list(IDS)),
    "texts": (["7", "3", "x", "y"], ["7", "3", "x", "y"]),
    "numpy texts": ([np.str_("a"), np.str_(""), np.str_("c"), "d"], ["a", "", "c", "d"]),
    "numpy scalars": ([np.int64(7), np.int32(3), np.uint8(12), 5], list(IDS)),
    "0-d tensors": ([torch.tensor(1), torch.tensor(2), torch.tensor([3]), np.array(4)], [1, 2, 3, 4]),
    "tuple": (tuple(IDS), list(IDS)),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("layout", ID_LAYOUTS)
def test_pickle_ids(tmp_path: Path, layout: str, protocol: int) -> None:
    given, expected = ID_LAYOUTS[layout]
    assert converted(convert_pickle(tmp_path, {"embeddings": VECTORS, "sample_ids": given}, protocol))[0] == expected


@pytest.mark.parametrize("rows", [list(VECTORS.astype("f2")), torch.tensor(VECTORS, dtype=torch.float16)])
def test_pickled_halves_stay_halves_and_doubles_do_not(tmp_path: Path, rows: Any) -> None:
    target = convert_pickle(tmp_path, {"embeddings": rows, "sample_ids": IDS})
    assert str(pq.read_schema(target).field("embedding").type.value_type) == "halffloat"
    target = convert_pickle(tmp_path, {"embeddings": VECTORS.astype("f8"), "sample_ids": IDS})
    assert str(pq.read_schema(target).field("embedding").type.value_type) == "float"


def test_dict_of_vectors_needs_no_ids_and_its_keys_may_be_scalars(tmp_path: Path) -> None:
    rows = {np.int64(id_): row for id_, row in zip(IDS, VECTORS, strict=True)}
    ids, values = converted(convert_pickle(tmp_path, {"embeddings": rows}))
    assert ids == IDS
    assert np.array_equal(values, VECTORS)


def test_other_keys_of_metadata_do_not_matter(tmp_path: Path) -> None:
    extra = {"dtype": torch.float16, "shape": torch.Size([4, 3]), "device": torch.device("cpu"), "n": np.float32(4)}
    assert converted(convert_pickle(tmp_path, {"embeddings": VECTORS, "sample_ids": IDS, **extra}))[0] == IDS


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_save(tmp_path: Path, zipped: bool) -> None:
    content = {"embeddings": torch.tensor(VECTORS), "sample_ids": [torch.tensor(i) for i in IDS]}
    torch.save(content, tmp_path / "in.pkl", _use_new_zipfile_serialization=zipped)
    assert run_pickle(tmp_path) == 0
    ids, values = converted(tmp_path / "source.parquet")
    assert ids == IDS
    assert np.array_equal(values, VECTORS)


# Payloads. Each would write the file "hit" into the working folder.


class Reduces:
    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.reduced


def payload() -> Reduces:
    return Reduces(os.system, "touch hit")


def legacy_torch_file(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def dotted(module: str, name: str, argument: str) -> bytes:
    """Protocol 4 looks up a dotted name attribute by attribute, which leads from any module to any other."""
    texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"\x80\x04" + texts + b"\x93\x8c" + bytes([len(argument)]) + argument.encode() + b"\x85R."


HIT = "__import__('os').system('touch hit')"
FLOAT = Reduces(np.dtype, "f8", False, True)
LOAD_STORAGE: Any = torch.storage._load_from_bytes
REBUILD: Any = torch._utils._rebuild_tensor_v2
RECONSTRUCT: Any = np.zeros(1).__reduce__()[0]
SCALAR: Any = np.float32(1).__reduce__()[0]
PAYLOADS: dict[str, tuple[object, str]] = {
    "system": (payload(), "posix.system"),
    "eval": (Reduces(eval, HIT), "builtins.eval"),
    "exec in an id": ({"embeddings": VECTORS, "sample_ids": [Reduces(exec, HIT)]}, "builtins.exec"),
    "Popen": (Reduces(subprocess.Popen, ["touch", "hit"]), "subprocess.Popen"),
    "getattr": (Reduces(getattr, "", "join"), "builtins.getattr"),
    "in an object array": (np.array([payload()], dtype=object), "posix.system"),
    "as an array's subtype": (Reduces(RECONSTRUCT, payload(), (0,), b"b"), "posix.system"),
    "as a state": (Reduces(RECONSTRUCT, np.ndarray, (0,), b"b", state=payload()), "posix.system"),
    "as a codec": (b"c_codecs\nencode\n(Vabc\nVrot13\ntR.", "rot13"),
    "by opcode INST": (b"(S'touch hit'\nios\nsystem\n.", "os.system"),
    "by opcode OBJ": (b"(cos\nsystem\nS'touch hit'\no.", "os.system"),
    "dotted, via numpy": (dotted("numpy", "ndarray.__class__", HIT), "numpy.ndarray.__class__"),
    "dotted, via codecs": (dotted("_codecs", "encode.__self__.decode", HIT), "_codecs.encode.__self__.decode"),
    "dotted, via torch": (dotted("torch.serialization", "os.system", "touch hit"), "torch.serialization.os.system"),
    "numpy, whose testing can exec": (dotted("numpy.testing._private.utils", "runstring", HIT), "runstring"),
    "torch.load": (Reduces(torch.load, "in.pkl"), "torch.serialization.load"),
    "a storage that is a pickle": (Reduces(LOAD_STORAGE, pickle.dumps(payload(), 2)), "posix.system"),
    "a storage of torch.save": (Reduces(LOAD_STORAGE, legacy_torch_file(payload())), "posix.system"),
    "torch.save before zip": (legacy_torch_file(payload()), "posix.system"),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_payload_is_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content, culprit = PAYLOADS[name]
    refused(tmp_path, content)
    said = capsys.readouterr().err
    assert culprit in said
    assert "hint: " in said


def test_payload_in_zip_of_torch_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"embeddings": payload()}, buffer)
    refused(tmp_path, buffer.getvalue())
    assert "posix.system" in capsys.readouterr().err


def test_payloads_are_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own unpickler executes them: the tests above pass because of ours."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "system",
        "eval",
        "in an object array",
        "by opcode INST",
        "dotted, via torch",
        "a storage of torch.save",
    ):
        content = PAYLOADS[name][0]
        pickle.loads(content if isinstance(content, bytes) else pickle.dumps(content))
        Path("hit").unlink()


STORAGE = torch.arange(4.0)._typed_storage()  # type: ignore[no-untyped-call]
ONES = np.ones(2).tobytes()
FIELDS = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 27)
FORGED: dict[str, tuple[object, str]] = {
    "objects from bytes": (Reduces(SCALAR, Reduces(np.dtype, "O8", False, True), ONES), "cannot hold Python objects"),
    "dtype of structure": (Reduces(np.dtype, "V8", False, True), "dtype 'V8'"),
    "dtype with fields": (Reduces(np.dtype, "f8", False, True, state=(3, "|", None, ("a",), {}, 8, 1, 0)), "fields"),
    "both": (Reduces(np.dtype, "V8", False, True, state=FIELDS), "dtype 'V8'"),
    "too few bytes": (Reduces(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (99,), FLOAT, False, ONES)), "(99,)"),
    "no dtype": (Reduces(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (2,), "f8", False, ONES)), "cannot hold"),
    "second state": (
        pickle.dumps(VECTORS, 2)[:-1] + pickle.dumps((1, (1,), False, [0]), 2)[2:-1] + b"b.",
        "two states",
    ),
    "past the storage": (Reduces(REBUILD, STORAGE, 2, (2, 2), (2, 1), False, OrderedDict()), "needs 6 numbers"),
    "before the storage": (Reduces(REBUILD, STORAGE, 3, (2,), (-1,), False, OrderedDict()), "stride (-1,)"),
    "storage of a text": (Reduces(REBUILD, "storage", 0, (2,), (1,), False, OrderedDict()), "without storage"),
    "attribute of a callable": (b"cnumpy\ndtype\n}Vx\nI1\nsb.", "has no state"),
    "slot of a callable": (b"cnumpy\ndtype\nN}V_function\nI1\ns\x86b.", "has no state"),
    "attribute of a class": (b"cnumpy\nndarray\n}Vx\nI1\nsb.", "'str' object"),
    "a class to instantiate": (b"\x80\x02cnumpy\nndarray\nI4\n\x85\x81.", "must be a type"),
    "call of a text": (b"cnumpy\nndarray\nI4\n\x85R.", "not callable"),
    "an extension": (b"\x80\x02\x82\x01.", "extension code 1"),
    "a persistent id": (b"Vstorage\n\x51.", "persistent id"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_objects_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """numpy and torch would take some of these and read, or later run, memory that is not theirs."""
    content, reason = FORGED[name]
    refused(tmp_path, content)
    said = capsys.readouterr().err
    assert "in.pkl is not a readable pickle of data" in said
    assert reason in said


def test_allowed_callables_are_stand_ins() -> None:
    own = {type(value).__module__ for value in safe_pickle.ALLOWED.values()}
    assert own == {"fusion.convert.safe_pickle", "builtins"}
    assert all(isinstance(value, str) or not hasattr(value, "__dict__") for value in safe_pickle.ALLOWED.values())


# Errors


BAD_NPY: dict[str, tuple[Any, Any, list[str]]] = {
    "objects": (VECTORS, np.array(["a", 1, 2, 3], dtype=object), ["ids.npy[1] is a int", "only integers or only text"]),
    "lengths": (VECTORS, np.arange(5), ["4 rows", "5 ids"]),
    "id twice": (VECTORS, np.array([3, 9, 3, 9]), ["2 ids", "first 3, 9", "ids.npy"]),
    "text id twice": (VECTORS, np.array(["a", "b", "a", "c"]), ["1 ids", "first a", "ids.npy"]),
    "one dimension": (VECTORS[0], np.arange(3), ["(3,)", "(rows, dim)"]),
    "three dimensions": (VECTORS[None], np.arange(1), ["(1, 4, 3)"]),
    "no rows": (VECTORS[:0], np.arange(0), ["(0, 3)"]),
    "text": (VECTORS.astype(str), np.arange(4), ["<U32", "expected numbers"]),
    "complex": (VECTORS.astype("c8"), np.arange(4), ["complex64"]),
    "float ids": (VECTORS, np.arange(4.0), ["ids.npy", "float64"]),
    "table of ids": (VECTORS, np.ones((4, 2), "i8"), ["ids.npy", "(4, 2)"]),
    "large id": (VECTORS, np.array([1, 2, 3, 2**64 - 1], "u8"), ["ids.npy", "18446744073709551615"]),
    "id not UTF-8": (VECTORS, np.array([b"a", b"b", b"c", b"\xff"]), ["ids.npy", "UTF-8"]),
}


@pytest.mark.parametrize("name", BAD_NPY)
def test_npy_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    vectors, ids, expected = BAD_NPY[name]
    np.save(tmp_path / "embeddings.npy", vectors)
    np.save(tmp_path / "ids.npy", ids)
    assert run_npy(tmp_path) == 65
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "\nhint: " in said
    assert [text for text in expected if text not in said] == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("n_bytes", [0, 4, 60, 130, 170])
def test_truncated_npy(tmp_path: Path, capsys: pytest.CaptureFixture[str], n_bytes: int) -> None:
    np.save(tmp_path / "ids.npy", np.arange(4))
    np.save(tmp_path / "embeddings.npy", VECTORS)
    whole = (tmp_path / "embeddings.npy").read_bytes()
    (tmp_path / "embeddings.npy").write_bytes(whole[:n_bytes])
    assert run_npy(tmp_path) == 65
    assert "embeddings.npy is not a complete .npy file" in capsys.readouterr().err


def test_npy_that_is_a_pickle_is_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "embeddings.npy", VECTORS)
    (tmp_path / "ids.npy").write_bytes(pickle.dumps(payload()))
    assert run_npy(tmp_path) == 65
    np.save(tmp_path / "ids.npy", np.array([payload()], dtype=object))
    assert run_npy(tmp_path) == 65
    assert not Path("hit").exists()
    assert "ids.npy" in capsys.readouterr().err


BAD_PICKLES: dict[str, tuple[object, list[str]]] = {
    "a list": ([1], ["holds a list", "expected a dict"]),
    "no embeddings": ({"vectors": 1, "sample_ids": [1]}, ["'embeddings'", "'vectors', 'sample_ids'"]),
    "no ids": ({"embeddings": VECTORS, "ids": 1}, ["'sample_ids'", "'embeddings', 'ids'"]),
    "lengths": ({"embeddings": VECTORS, "sample_ids": [1, 2]}, ["4 rows", "2 ids"]),
    "id twice": ({"embeddings": VECTORS, "sample_ids": [1, 2, 1, 3]}, ["1 ids", "first 1", "in.pkl"]),
    "id twice as a scalar": (
        {"embeddings": {1: VECTORS[0], "1": VECTORS[1]}},
        ["[1] is a str", "only integers or only text"],
    ),
    "ids of two kinds": (
        {"embeddings": VECTORS, "sample_ids": [1, "a", 2, 3]},
        ["[1] is a str", "only integers or only text"],
    ),
    "float id": ({"embeddings": VECTORS, "sample_ids": [1, 2, 2.5, 3]}, ["sample_ids", "[2] is a float"]),
    "bool id": ({"embeddings": VECTORS, "sample_ids": [1, 2, 4, True]}, ["[3] is a bool"]),
    "large id": ({"embeddings": VECTORS, "sample_ids": [1, 2, 3, 2**70]}, ["neither int64 nor"]),
    "surrogate id": ({"embeddings": VECTORS, "sample_ids": ["a", "b", "c", "\ud800"]}, ["UTF-8"]),
    "one id": ({"embeddings": VECTORS, "sample_ids": 5}, ["is a int", "expected a list"]),
    "ragged": ({"embeddings": [VECTORS[0], VECTORS[1, :2]], "sample_ids": [1, 2]}, ["length 3", "row 1 has 2"]),
    "ragged lists": ({"embeddings": [[1.0, 2.0], [1.0]], "sample_ids": [1, 2]}, ["length 2", "row 1 has 1"]),
    "ragged inside": ({"embeddings": [[[1.0, 2.0], [1.0]]], "sample_ids": [1]}, ["[0] is ragged"]),
    "scalars": ({"embeddings": [1.0, 2.0], "sample_ids": [1, 2]}, ["[0] has shape ()"]),
    "texts": ({"embeddings": [["a"], ["b"]], "sample_ids": [1, 2]}, ["<U1", "expected numbers"]),
    "a text": ({"embeddings": "abc", "sample_ids": [1, 2]}, ["expected numbers"]),
    "None": ({"embeddings": [None, [1.0]], "sample_ids": [1, 2]}, ["[0] has dtype object"]),
    "nothing": ({"embeddings": [], "sample_ids": []}, ["is empty"]),
    "other ids": ({"embeddings": {1: [1.0], 2: [2.0]}, "sample_ids": [1, 3]}, ["lacks 1 ids", "[3]"]),
    "dict of other length": ({"embeddings": {1: [1.0], 2: [2.0]}, "sample_ids": [1]}, ["2 rows", "1 ids"]),
    "empty": (b"", ["EOFError"]),
    "text file": (b"sample_id,price\n1,2\n", ["not a readable pickle"]),
    "broken zip": (b"PK\x03\x04 and more", ["not a readable pickle", "torch.load"]),
    "truncated": (pickle.dumps({"embeddings": VECTORS, "sample_ids": IDS})[:-9], ["not a readable pickle"]),
}


@pytest.mark.parametrize("name", BAD_PICKLES)
def test_pickle_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    content, expected = BAD_PICKLES[name]
    refused(tmp_path, content)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "\nhint: " in said
    assert [text for text in [*expected, "in.pkl"] if text not in said] == []


def test_sparse_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"embeddings": torch.eye(2).to_sparse(), "sample_ids": [1, 2]}, tmp_path / "in.pkl")
    assert run_pickle(tmp_path) == 65
    assert "is not a plain tensor" in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str) -> None:
    missing = f"{scheme}{tmp_path}/none.pkl"
    assert main(["--pickle", missing, "--to", str(tmp_path / "a.parquet")]) == 65
    assert missing in capsys.readouterr().err


def test_double_that_float32_cannot_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old").mkdir()
    refused(tmp_path / "old", {"embeddings": np.full((4, 3), 1e300), "sample_ids": IDS})
    assert "float32" in capsys.readouterr().err


def test_a_failed_conversion_keeps_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = convert_pickle(tmp_path, {"embeddings": VECTORS, "sample_ids": IDS})
    before = target.read_bytes()
    n_rows = ROW_GROUP + 1
    vectors = np.zeros((n_rows, 2))
    vectors[-1] = 1e300  # the error is in the second batch, after the first one was written
    (tmp_path / "in.pkl").write_bytes(pickle.dumps({"embeddings": vectors, "sample_ids": list(range(n_rows))}))
    assert run_pickle(tmp_path) == 65
    assert target.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.pkl", "source.parquet"]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--to", "a.parquet"],
        ["--to", "a.parquet", "--ids", "a.npy"],
        ["--to", "a.parquet", "--pickle", "a", "--ids", "b"],
        ["--to", "a.csv", "--pickle", "a"],
        ["--to", "a.parquet", "--pick", "a"],
        ["--to", "a.parquet", "--pickle", "nosuch://a"],
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert main(argv) == 64
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "\nhint: " in said


def test_help_as_a_command() -> None:
    command = [sys.executable, "-m", "fusion.convert", "--help"]
    wide = {**os.environ, "COLUMNS": "120"}  # where the example needs no further lines
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=wide)
    assert done.returncode == 0
    assert "--embeddings image_embeddings.npy --ids" in done.stdout


def test_torch_is_imported_only_for_torch(tmp_path: Path) -> None:
    (tmp_path / "in.pkl").write_bytes(pickle.dumps({"embeddings": VECTORS, "sample_ids": IDS}))
    code = (
        "import sys; from fusion.convert.__main__ import main; "
        f"assert main(['--pickle', {str(tmp_path / 'in.pkl')!r}, '--to', {str(tmp_path / 'a.parquet')!r}]) == 0; "
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_load_names_the_file_in_its_error(tmp_path: Path) -> None:
    (tmp_path / "in.pkl").write_bytes(b"")
    with pytest.raises(DataError, match=r"s3://bucket/x\.pkl"):
        safe_pickle.load(tmp_path / "in.pkl", "s3://bucket/x.pkl")
