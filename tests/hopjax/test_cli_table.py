"""Tables of the command line: what is written comes back, in every format, and nothing else is taken for a table."""

import csv
import json
import os

import numpy as np
import pytest
from pyarrow import parquet

from hopjax.cli import output, table
from hopjax.cli.options import UsageError
from hopjax.cli.table import Table

SUFFIXES = (".parquet", ".csv", ".npz")


@pytest.fixture
def odd():
    """Numbers that a careless writer would change."""
    tiny, large = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float64).max
    columns = {
        "index": np.array([0, 2**62, -1, 3]),
        "energy": np.array([0.1, tiny, -0.0, np.inf], np.float32),
        "excess": np.array([1 / 3, np.nan, -large, 5e-324]),
        "file": np.array(["a.png", 'β, "b".png', *map(table.printable, ("two\n# lines", "no utf-8 \udce9"))]),
    }
    return Table(
        columns,
        {
            "beta": 1 / 3,
            "rule": 'β, "quoted": 1\nand # more',
            "task1": {"classes": ["a", "b"], "none": None},
            "data": "\udce9",
            "warnings": [],
        },
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tables_come_back_bit_for_bit(odd, suffix, tmp_path):
    path = tmp_path / f"t{suffix}"
    table.write(path, odd)
    found = table.read(path)
    assert found.settings == odd.settings
    assert list(found.columns) == list(odd.columns)
    for name, column in odd.columns.items():
        assert found[name].dtype == column.dtype
        assert found[name].tobytes() == column.tobytes()
    first = path.read_bytes()
    table.write(path, odd)
    assert path.read_bytes() == first


def test_other_programs_can_read_them(odd, tmp_path):
    for suffix in SUFFIXES:
        table.write(tmp_path / f"t{suffix}", odd)
    stored = parquet.read_table(tmp_path / "t.parquet")
    assert stored.column_names == list(odd.columns)
    assert json.loads(stored.schema.metadata[b"hopjax"]) == odd.settings
    with np.load(tmp_path / "t.npz", allow_pickle=False) as arrays:
        assert json.loads(str(arrays["settings"])) == odd.settings
        assert arrays["energy"].dtype == np.float32
    lines = (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines if line.startswith("# ")]
    assert "# beta: 0.3333333333333333" in comments
    head, *rows = csv.reader(lines[len(comments) :])
    assert head == list(odd.columns)
    assert rows[0] == ["0", "0.1", "0.3333333333333333", "a.png"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"nonsense", b"PAR1 and no more PAR1", b"a,b\n1,2\n", b'# types: {"a": "int64"}\na\nx\n', None])
def test_what_is_no_table_is_refused_in_one_line(odd, suffix, content, tmp_path):
    path = tmp_path / f"t{suffix}"
    if content is None:  # torn
        table.write(path, odd)
        content = path.read_bytes()[:-60]
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is no table that this command wrote, or is torn") as caught:
        table.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_and_npz_of_others_are_refused(tmp_path):
    import pyarrow as pa

    parquet.write_table(pa.table({"a": [1]}), tmp_path / "t.parquet")
    np.savez(tmp_path / "t.npz", a=np.ones(3))
    np.savez(tmp_path / "pickled.npz", settings=np.array({"a": 1}, object))
    for name in ("t.parquet", "t.npz", "pickled.npz"):
        with pytest.raises(UsageError, match="is no table that this command wrote"):
            table.read(tmp_path / name)


def test_a_missing_table_says_how_to_make_it(tmp_path):
    with pytest.raises(UsageError, match="does not exist; `python -m hopjax energies DATA --out"):
        table.read(tmp_path / "t.csv")
    with pytest.raises(UsageError, match=r"ends in one of .parquet, .csv, .npz, such as .*t.parquet"):
        table.read(tmp_path / "t.xlsx")


def test_a_write_that_fails_leaves_what_was_there(odd, tmp_path, monkeypatch):
    path = tmp_path / "t.npz"
    table.write(path, odd)
    before = path.read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        output.write(path, b"new")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
