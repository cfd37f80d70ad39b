"""Photographs in LMDB, the form of HSFace, VFace and other sets of Vec2Face's authors.

A record is `KEY -> (picture's file, label)`, or `(picture's file, feature, label, ...)` in the sets that Vec2Face is
trained on, in MessagePack or pickled. `__keys__` has the list of the keys, `__len__` their number, `__classnum__` the
largest label plus 1. Pickles are read without executing anything.
"""

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from tqdm import tqdm

from ..files import brief, printable
from .lmdb_file import Record, iterate_records
from .photographs import Photograph, PhotographSource, is_system_entry
from .plain_msgpack import Item, Span, is_array, pack, read_array, read_number
from .plain_pickle import PlainUnpickler, RefusedPickleError, picture_bytes

if TYPE_CHECKING:
    from lmdb import Environment

KEYS, LENGTH, CLASSES, NAMES = b"__keys__", b"__len__", b"__classnum__", b"__names__"
DATA = "data.mdb"  # in a folder of LMDB's own layout
WAITING = 1000  # records of a transaction
MAP_SIZE = 2**40  # the file grows to what is in it


def find_databases(path: Path) -> list[Path]:
    """The LMDB file at a path: it is one, a folder of LMDB's (`data.mdb`), or a folder with a single `*.lmdb`.

    Raises:
        ValueError: a folder has several: their labels may count different people.
    """
    if path.suffix.lower() in (".lmdb", ".mdb") and path.is_file():
        return [path]
    if not path.is_dir():
        return []
    if (path / DATA).is_file():
        return [path / DATA]
    entries = [entry for entry in sorted(path.iterdir()) if entry.suffix.lower() == ".lmdb"]
    found = [entry / DATA if entry.is_dir() else entry for entry in entries if not is_system_entry(entry.name)]
    if len(found) > 1:
        names = ", ".join(entry.name for entry in entries)
        raise ValueError(f"{path} has {len(found)} LMDB sets, {names}, whose labels count their own people: name one.")
    return found


def beside_database(file: Path) -> list[Path]:
    """The locks of LMDB's library."""
    return [file.with_name("lock.mdb"), file.with_name(f"{file.name}-lock")]


class _Place(NamedTuple):
    """A value in the file, and the picture within; of a pickle, the picture's place is not known."""

    offset: int
    size: int
    picture: Span | None


class LmdbSource(PhotographSource):
    """
    Args:
        path: the database's file.

    Raises:
        ValueError: it is damaged, a pickle in it refers to more than data, labels are numbers and text, or there are
            more or fewer keys than it says.
    """

    def __init__(self, path: Path):
        self.path, self.photographs, self.left_out = path, [], {}
        self.places: dict[str, _Place] = {}
        records = {record.key: record for record in tqdm(iterate_records(path), desc="index", unit="record")}
        with open(path, "rb") as file:
            listed, names = self._lists(file, records)
            labels = dict(self._labels(file, records, listed))
        kinds = {type(label): key for key, label in labels.items()}
        if len(kinds) > 1:
            examples = " and ".join(f"{labels[key]!r} of key {key}" for key in kinds.values())
            raise ValueError(f"the labels in {path} are numbers and text, {examples}: identities could not be told.")
        self.photographs = [Photograph(names.get(label) or _identity(label), key) for key, label in labels.items()]
        for record in records.values():
            name = _shown(record.key)
            if name not in self.places and name not in self.left_out and not record.key.startswith(b"__"):
                self.left_out[name] = "a record that is not in __keys__"

    def _lists(self, file: BinaryIO, records: dict[bytes, Record]) -> tuple[list[bytes], dict[Item | str, str]]:
        """The keys of the pictures in their order, and label -> name where the set was written by us."""
        keys = self._keys(file, records)
        if LENGTH in records:
            content = _value(file, records[LENGTH])
            try:
                number = self._unpickle(LENGTH, content) if content[:1] in b"\x80IKML" and content[1:] else None
                number = read_number(content) if number is None else number
            except ValueError as error:
                raise ValueError(f"__len__ in {self.path} cannot be read: {error}.") from error
            if number != len(keys):
                raise ValueError(
                    f"{self.path} has {len(keys)} keys, its __len__ says {number!r}: it is not whole. Copy it again."
                )
        if NAMES not in records:
            return keys, {}
        flat = self._array(file, records[NAMES])
        named = [each if isinstance(each, int) else self._text(file, records[NAMES], each) for each in flat]
        names: dict[Item | str, str] = dict(zip(named[::2], map(str, named[1::2]), strict=True))
        if len(set(names.values())) < len(names):
            raise ValueError(f"__names__ in {self.path} has two labels of one name: identities could not be told.")
        return keys, names

    def _keys(self, file: BinaryIO, records: dict[bytes, Record]) -> list[bytes]:
        if KEYS not in records:
            keys = [key for key in records if not (key.startswith(b"__") and key.endswith(b"__"))]
            # LMDB sorts 10 before 2
            return sorted(keys, key=int) if all(key.isdigit() for key in keys) else keys
        content = _value(file, records[KEYS])
        if is_array(content):
            spans = self._array(file, records[KEYS])
            listed: Any = [content[item.start : item.start + item.length] if isinstance(item, Span) else item
                           for item in spans]  # fmt: skip
        else:
            listed = self._unpickle(KEYS, content)
        if not isinstance(listed, list | tuple):
            raise ValueError(f"__keys__ in {self.path} is {type(listed).__name__}, not a list of keys.")
        keys = [key.encode() if isinstance(key, str) else key for key in listed]
        wrong = next((key for key in keys if not isinstance(key, bytes)), None)
        if wrong is not None:
            raise ValueError(f"__keys__ in {self.path} has {wrong!r}, which is no key.")
        if len(set(keys)) < len(keys):
            raise ValueError(f"__keys__ in {self.path} has a key twice: one record would count as two pictures.")
        return keys

    def _labels(
        self, file: BinaryIO, records: dict[bytes, Record], keys: Iterable[bytes]
    ) -> Iterator[tuple[str, int | str]]:
        """Key and label of each picture; notes where it is."""
        for key in tqdm(keys, desc="labels", unit="record"):
            name = _shown(key)
            if key not in records:
                self.left_out[name] = "in __keys__, but without a record"
                continue
            record = records[key]
            try:
                label, picture = self._parse(file, record)
            except RefusedPickleError:
                raise
            except ValueError as error:
                self.left_out[name] = f"a record that is no picture and label ({brief(error)})"
                continue
            if isinstance(label, int) and label < 0 or label == "":
                self.left_out[name] = "without a label"
                continue
            self.places[name] = _Place(record.offset, record.size, picture)
            yield name, label

    def _parse(self, file: BinaryIO, record: Record) -> tuple[int | str, Span | None]:
        file.seek(record.offset)
        if not is_array(file.read(min(1, record.size))):
            values = self._unpickle(record.key, _value(file, record))
            _check_pair(values)
            picture_bytes(values[0])
            return _label([each.decode() if isinstance(each, bytes) else each for each in values[1:]]), None
        items = self._array(file, record)
        _check_pair(items)
        if not isinstance(items[0], Span):
            raise ValueError(f"an image is {type(items[0]).__name__}, not bytes")
        rest = [
            self._text(file, record, item) if isinstance(item, Span) and len(items) == 2 else item
            for item in items[1:]
        ]
        return _label(rest), items[0]

    def _array(self, file: BinaryIO, record: Record) -> list[Item]:
        def read(start: int, length: int) -> bytes:
            file.seek(record.offset + start)
            return file.read(length)

        return read_array(read, record.size)

    def _text(self, file: BinaryIO, record: Record, item: Item) -> str:
        if not isinstance(item, Span):
            raise ValueError(f"a name is {type(item).__name__}, not text")
        file.seek(record.offset + item.start)
        return file.read(item.length).decode()

    def _unpickle(self, key: bytes, content: bytes) -> Any:
        """
        Raises:
            RefusedPickleError: it refers to more than data.
            ValueError: it is neither a pickle nor an array of MessagePack.
        """
        try:
            return PlainUnpickler(io.BytesIO(content), "(bytes, int)").load()
        except RefusedPickleError as error:
            raise RefusedPickleError(f"{self.path}, key {_shown(key)}: {error}.") from error
        except Exception as error:  # damaged pickles raise nearly anything
            raise ValueError("neither MessagePack nor a pickle of plain data") from error

    def content(self, photograph: Photograph) -> bytes:
        offset, size, picture = self.places[photograph.file]
        with open(self.path, "rb") as file:
            if picture is not None:
                file.seek(offset + picture.start)
                return file.read(picture.length)
            content = _value(file, Record(photograph.file.encode(), offset, size))
        try:
            return picture_bytes(self._unpickle(photograph.file.encode(), content)[0])
        except (ValueError, TypeError, IndexError) as error:
            raise OSError(f"{self.path} was changed while it was read, at key {photograph.file}.") from error

    def stamp(self, photograph: Photograph) -> str:
        return str(self.places[photograph.file].size)


def _shown(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace")


def _value(file: BinaryIO, record: Record) -> bytes:
    file.seek(record.offset)
    return file.read(record.size)


def _check_pair(values: object) -> None:
    if not isinstance(values, list | tuple) or len(values) < 2:
        raise ValueError("it is not a picture and a label")


def _label(rest: list) -> int | str:
    """The label among what follows the picture: the first whole number, or the text of a pair."""
    number = next((each for each in rest if isinstance(each, int) and not isinstance(each, bool)), None)
    if number is not None:
        return number
    if len(rest) == 1 and isinstance(rest[0], str):
        return rest[0]
    raise ValueError(f"its label is {type(rest[0]).__name__}, neither a whole number nor text")


def _identity(label: int | str) -> str:
    return f"{label:07d}" if isinstance(label, int) else printable(label)


def import_lmdb() -> Any:
    """The library that writes LMDB; reading does without.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import lmdb
    except ImportError as error:
        raise ValueError(
            "writing LMDB needs the package `lmdb`: pip install lmdb, or uiface-diffusers with the extra `lmdb`."
        ) from error
    return lmdb


class DatabaseWriter:
    """Writes what the loaders of Vec2Face's authors read: MessagePack of `(picture's file, label)` under `0`, `1`, ...

    Args:
        path: the database's file.
    """

    def __init__(self, path: Path):
        self.environment: Environment = import_lmdb().open(
            os.fspath(path), subdir=False, map_size=MAP_SIZE, lock=False, meminit=False
        )
        self.number, self.largest = 0, 0
        self.waiting: list[tuple[bytes, bytes]] = []

    def __enter__(self) -> "DatabaseWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.environment.close()

    def write(self, label: int, content: bytes) -> None:
        self.waiting.append((b"%d" % self.number, pack([content, label])))
        self.number, self.largest = self.number + 1, max(self.largest, label)
        if len(self.waiting) == WAITING:
            self._flush()

    def finish(self, names: dict[str, int]) -> None:
        """The lists behind the pictures; `__names__`, label and name in turns, is for our own reader."""
        keys = [b"%d" % number for number in range(self.number)]
        named = [each for name, label in names.items() for each in (label, name)]
        self.waiting += [(KEYS, pack(keys)), (LENGTH, pack(self.number)), (CLASSES, pack(self.largest + 1))]
        self.waiting.append((NAMES, pack(named)))
        self._flush()

    def _flush(self) -> None:
        with self.environment.begin(write=True) as transaction:
            for key, value in self.waiting:
                transaction.put(key, value)
        self.waiting = []
