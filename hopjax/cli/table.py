"""Tables of samples as parquet, csv or npz, with all that made them inside; `read` takes back what `write` wrote, bit for bit."""

import csv
import importlib.metadata
import io
import json
import platform
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hopjax.cli import output
from hopjax.cli.options import UsageError

_KEY = "hopjax"


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of one length, numbers or printable text, and the settings that gave them: plain JSON."""

    columns: dict[str, np.ndarray]
    settings: dict[str, Any]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def versions() -> dict[str, str]:
    """What computed."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in ("hopjax", "jax", "numpy")}


def printable(text: str) -> str:
    """On one line and in UTF-8, whatever a file is called: other characters are shown by their escapes."""
    return "".join(character if character.isprintable() else character.encode("unicode_escape").decode() for character in text)


def write(path: Path, table: Table) -> None:
    """In the format of the path's suffix; the same bytes for the same table."""
    settings = _json(table.settings)
    buffer = io.BytesIO()
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table(table.columns).replace_schema_metadata({_KEY: settings}), buffer)
    elif path.suffix == ".npz":
        with zipfile.ZipFile(buffer, "w") as archive:  # numpy.savez has an argument `file` of its own
            for name, column in {**table.columns, "settings": np.array(settings)}.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, column, allow_pickle=False)
    else:
        types = {name: str(column.dtype) for name, column in table.columns.items()}
        comments = {**table.settings, "types": types}
        lines = io.StringIO(newline="")
        lines.writelines(f"# {name}: {_json(value)}\n" for name, value in comments.items())
        rows = csv.writer(lines, lineterminator="\n")
        rows.writerow(table.columns)
        # NumPy's shortest digits that give the number back.
        rows.writerows(zip(*(map(str, column) for column in table.columns.values()), strict=True))
        buffer.write(lines.getvalue().encode())
    output.write(path, buffer.getvalue())


def _json(value: Any) -> str:
    """In UTF-8: of file names that are not, the rest is escaped."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace").decode()


def read(path: Path) -> Table:
    """Raises UsageError naming the file for one that is missing, torn or not of this kind."""
    output.check_suffix(path)
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            with path.open("rb") as file:  # opened here: its name need not be in UTF-8
                found = parquet.read_table(file)
            settings = json.loads(found.schema.metadata[_KEY.encode()])
            columns = {name: found[name].to_numpy() for name in found.column_names}
            return Table({name: column.astype(str) if column.dtype == object else column for name, column in columns.items()}, settings)
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                columns = dict(stored)
            return Table(columns, json.loads(str(columns.pop("settings"))))
        with path.open(newline="", encoding="utf-8") as text:
            lines = text.readlines()
        comments = [line[2:].partition(": ") for line in lines if line.startswith("# ")]
        settings = {name: json.loads(value) for name, _, value in comments}
        head, *rows = csv.reader(lines[len(comments) :])
        types = settings.pop("types")
        return Table({name: np.array(cells, types[name]) for name, cells in zip(head, zip(*rows, strict=True), strict=True)}, settings)
    except FileNotFoundError:
        raise UsageError(f"{path}: does not exist; `python -m hopjax energies DATA --out {path}` makes it") from None
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        zipfile.BadZipFile,
    ) as error:  # pyarrow's errors are ValueErrors and OSErrors
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(f"{path}: is no table that this command wrote, or is torn: {reason}") from None
