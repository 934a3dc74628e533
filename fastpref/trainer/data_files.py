"""Rows of training data from files, folders and the hub."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
TEXTS = ("prompt", "completion", "chosen", "rejected", "text")  # in CSV, a column of numbers is of texts here
Columns = Callable[[Sequence[str]], "str | None"]  # None if the columns will do, else what is wanted


class Rows(list[dict[str, Any]]):
    """Rows of files, and where each was found: `places[i]` of row i, a file and line."""

    def __init__(self, found: Iterable[tuple[str, dict[str, Any]]]) -> None:
        pairs = list(found)
        super().__init__(row for _, row in pairs)
        self.places = [place for place, _ in pairs]


def place_of(rows: Any, index: int) -> str:
    """How messages name a row: by file and line if it came of a file, else by its index."""
    return rows.places[index] if isinstance(rows, Rows) else f"row {index}"


def load_rows(
    name_or_path: str, *, columns: Columns, split: str = "train", config: str | None = None
) -> "Rows | datasets.Dataset":
    """Rows with at least the columns that are wanted, in file order, other columns untouched.

    Args:
        name_or_path: a .jsonl, .json, .parquet or .csv file, a folder of them or what datasets' `save_to_disk` wrote,
            or else the name of a dataset on the Hugging Face hub. A .json file holds one array of objects, or one
            object a line. A folder without such files is searched for them.
        split: of a folder, the files named after it (`test.jsonl`, `test-00000-of-00002.parquet`, `test/0.csv`) are
            read, in order of name; "train" reads every file where none is named so. A single file is "train".
        columns: given the names of a row's columns, None if they will do, else what is wanted.
        config: the hub dataset's configuration.
    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a line that is not a JSON object (file and line), columns missing (what is there, what is wanted),
            no rows, no such split, a config given for a file, or a hub name that could not be loaded.
        ImportError: datasets or pyarrow is not installed.
    """
    path = Path(name_or_path).expanduser()
    if not path.exists():
        if _means_a_path(name_or_path):
            raise FileNotFoundError(f"load_rows: no file or folder {name_or_path}")
        return _from_hub(name_or_path, split, config, columns)
    if config is not None:
        raise ValueError(f"load_rows: config belongs to hub datasets; got config={config!r} for {name_or_path}")
    if _is_saved(path):
        return _from_disk(path, split, columns)
    rows = Rows(found for file in _files(path, split) for found in _read(file, columns))
    if not rows:
        raise ValueError(f"load_rows: {name_or_path} holds no rows")
    return rows


def split_to_judge(name_or_path: str, config: str | None = None) -> str:
    """`test` where a folder or a hub dataset has that split, else `train`; a ValueError where the hub does not tell."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return "test" if _named(path, "test") or (_is_saved(path) and (path / "test").is_dir()) else "train"
    if path.exists() or _means_a_path(name_or_path) or find_spec("datasets") is None:
        return "train"  # which `load_rows` reads, or says what is missing
    import datasets

    try:
        return "test" if "test" in datasets.get_dataset_split_names(name_or_path, config) else "train"
    except (OSError, ValueError) as error:
        raise ValueError(
            f"split_to_judge: {name_or_path} is no file or folder here, and the hub did not name its splits: {error}"
        ) from error


def _means_a_path(name_or_path: str) -> bool:
    path = Path(name_or_path).expanduser()
    return path.suffix in SUFFIXES or path.is_absolute() or name_or_path.startswith((".", "~"))


def _is_saved(path: Path) -> bool:
    """By `save_to_disk` of datasets."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _rows_in(folder: Path) -> list[Path]:
    def found(files: Iterable[Path]) -> list[Path]:
        return sorted(file for file in files if file.suffix in SUFFIXES)

    # a copy of a hub dataset has them in folders, and others in hidden ones
    below = (file for file in folder.rglob("*") if "/." not in f"/{file.relative_to(folder).as_posix()}")
    return found(folder.iterdir()) or found(below)


def _named(folder: Path, split: str) -> list[Path]:
    names = (f"{split}-", f"{split}_")
    return [
        file
        for file in _rows_in(folder)
        if file.stem == split or file.name.startswith(names) or (file.parent != folder and file.parent.name == split)
    ]


def _files(path: Path, split: str) -> list[Path]:
    """The files of a split, by the rule in load_rows."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"load_rows: a file must end in {', '.join(SUFFIXES)}; got {path}")
        if split != "train":
            raise ValueError(f"load_rows: a single file has only the split 'train'; got {split!r} for {path}")
        return [path]
    files = _rows_in(path)
    if (named := _named(path, split)) or (files and split == "train"):
        return named or files
    there = ", ".join(file.name for file in files) or f"no file that ends in {', '.join(SUFFIXES)}"
    raise ValueError(f"load_rows: no file for the split {split!r} in {path}; it holds {there}")


def _read(path: Path, columns: Columns) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix in (".parquet", ".csv"):
        yield from _read_table(path, columns)
        return
    with path.open("rb") as file:
        is_array = path.suffix == ".json" and file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    yield from _read_array(path, columns) if is_array else _read_lines(path, columns)


def _read_lines(path: Path, columns: Columns) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if line.strip():
                yield where, _checked(_parse(line, where), where, columns)


def _read_array(path: Path, columns: Columns) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, row in enumerate(_parse(path.read_bytes(), str(path))):
        where = f"{path}, item {index}"
        yield where, _checked(row, where, columns)


def _read_table(path: Path, columns: Columns) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("load_rows: Parquet and CSV files need pyarrow: pip install 'fastpref[train]'") from error
    try:
        if path.suffix == ".csv":
            how = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(TEXTS, pyarrow.string()))
            lines = pyarrow.csv.ParseOptions(newlines_in_values=True)
            table = pyarrow.csv.read_csv(path, parse_options=lines, convert_options=how)
        else:
            table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        kind = {".csv": "CSV", ".parquet": "Parquet"}[path.suffix]
        raise ValueError(f"load_rows: {path} is not a readable {kind} file: {error}") from error
    _check_columns(table.column_names, str(path), columns)
    for index, row in enumerate(table.to_pylist()):
        yield f"{path}, row {index}", row


def _parse(text: bytes, where: str) -> Any:
    try:
        found = json.loads(text)
        if b"\\ud" in text.lower():  # half of a surrogate pair passes for JSON, and no tokenizer takes it
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except ValueError as error:  # malformed JSON, or not UTF-8
        raise ValueError(f"load_rows: {where}: not valid JSON: {error}") from error


def _checked(row: Any, where: str, columns: Columns) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"load_rows: {where}: a row must be a JSON object; got {type(row).__name__}")
    _check_columns(row, where, columns)
    return row


def _check_columns(found: Iterable[str], where: str, columns: Columns) -> None:
    there = list(found)
    if wanted := columns(there):
        raise ValueError(f"load_rows: {where}: columns wanted: {wanted}; got {', '.join(there) or 'none'}")


def _from_disk(path: Path, split: str, columns: Columns) -> "datasets.Dataset":
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"load_rows: {path} is a saved dataset: pip install 'fastpref[train]'") from error
    found = datasets.load_from_disk(str(path))
    splits = found if isinstance(found, datasets.DatasetDict) else {"train": found}
    if split not in splits:
        raise ValueError(f"load_rows: no split {split!r} in {path}; it holds {', '.join(splits)}")
    _check_columns(splits[split].column_names, str(path), columns)
    return splits[split]


def _from_hub(name: str, split: str, config: str | None, columns: Columns) -> "datasets.Dataset":
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"load_rows: {name} is no file or folder here; hub datasets need: pip install 'fastpref[train]'"
        ) from error
    try:
        dataset = datasets.load_dataset(name, name=config, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"load_rows: {name} is no file or folder here, and the hub did not give it: {error}"
        ) from error
    _check_columns(dataset.column_names, name, columns)
    return dataset
