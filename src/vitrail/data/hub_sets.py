"""Data sets of the Hub as `hf://datasets/ORG/NAME[@REVISION][/FOLDER]`: Parquet that is read while training.

Only the footers, the labels and one block of images are read when a set is opened.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import torch

from vitrail.data.parquet import IMAGES, LABELS, Table, choose_column, class_names, labelled
from vitrail.data.sources import SPLITS, cache_folder, is_litter, named_files, split_of
from vitrail.data.streaming import BLOCK, WINDOW, Block, Cache, HubFile, Remote, Streamed, name_of
from vitrail.errors import UserError, first_line
from vitrail.hub_access import endpoint, refusal

log = logging.getLogger("vitrail")

SCHEME = "hf://"
FORM = "hf://datasets/ORG/NAME[@REVISION][/FOLDER]"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
ADDRESS = re.compile(
    rf"hf://datasets/(?P<name>{NAME}/{NAME})(@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(/(?P<folder>.*))?"
)
COMMIT = re.compile(r"[0-9a-f]{40}")
CONVERTED = "refs/convert/parquet"
"""the revision in which the Hub keeps a copy of many sets as Parquet"""
READERS = 16
"""files whose labels are read at the same time"""
REMEDY = "download the set, and give --data its folder"


def is_address(data: str | Path) -> bool:
    """Whether this is a place on the Hub."""
    return str(data).startswith(SCHEME)


class Address(NamedTuple):
    """A folder of a data set at a revision, which may be a commit."""

    name: str
    revision: str
    folder: str
    """without slashes around; "" for all of the set"""

    def __str__(self) -> str:
        at = "" if self.revision == "main" else f"@{self.revision}"
        return f"{SCHEME}datasets/{self.name}{at}" + (f"/{self.folder}" if self.folder else "")


def parse(data: str) -> Address:
    match = ADDRESS.fullmatch(data)
    if match is None:
        raise UserError(f"{data} is no data set of the Hub: write {FORM}")
    return Address(match["name"], unquote(match["revision"] or "main"), (match["folder"] or "").strip("/"))


def pinned(data: str) -> str:
    """The same data, at the commit where its revision is now; data elsewhere is unchanged."""
    if not is_address(data) or COMMIT.fullmatch((address := parse(data)).revision):
        return data
    return str(address._replace(revision=_info(address).sha))


def is_same(data: str, pinned: str) -> bool:
    """Whether `pinned` is the data set `data` of the Hub at a commit: at that of `data`, if it names one."""
    if not is_address(pinned):
        return False
    address, own = parse(data), parse(pinned)
    return address == (own if COMMIT.fullmatch(address.revision) else own._replace(revision=address.revision))


@dataclass
class HubData:
    """A data set with its splits. The images are not read yet."""

    address: Address
    tables: dict[str, Table]
    bytes: int
    licence: str

    def line(self, classes: int) -> str:
        counts = {split: len(table.labels) for split, table in self.tables.items()}
        rows = ", ".join(f"{count:,} {split}" for split, count in counts.items() if count)
        return (
            f"{self.address.name} at commit {self.address.revision[:12]}: {rows} rows, {classes:,} classes, "
            f"{self.bytes / 1e6:,.0f} MB, {self.licence}; streamed from the Hub"
        )


def read(data: str, grouped: bool = False) -> HubData:
    """The splits of a data set with one class per image, whose images are read when they are needed.

    Raises UserError for a set that is not there or not readable as such, and RunError if the Hub stops to answer.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError("streaming a data set needs pyarrow: pip install 'vitrail[data]'") from None
    if grouped:
        raise UserError(f"--group needs the names of images, which are not read from {data}: leave it out")
    address = parse(data)
    info = _info(address)
    address = address._replace(revision=info.sha)
    files = _files(address, info)
    card = (info.card_data.to_dict() if info.card_data is not None else {}) or {}
    licence = card.get("license_name") or card.get("license")
    licence = ", ".join(licence) if isinstance(licence, list) else licence
    tables = {split: _table(address, own) for split, own in files.items()}
    if len({tuple(table.names or ()) for table in tables.values()}) > 1:
        raise UserError(f"{address}: its splits have other classes, or in another order: {REMEDY}")
    size = sum(file.size for own in files.values() for file in own)
    return HubData(address, tables, size, f"licence {licence}" if licence else "no licence in its card")


# ---- the files of a set


def _info(address: Address) -> Any:
    """What the Hub knows of a data set: commit, files, card."""
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint())
    how = {"revision": address.revision, "files_metadata": True, "timeout": constants.HF_HUB_ETAG_TIMEOUT}
    try:
        return api.dataset_info(address.name, **how)  # type: ignore[arg-type]
    except Exception as error:  # the network libraries raise many types
        raise _refusal(address, error) from None


def _refusal(address: Address, error: Exception) -> UserError:
    """One line for the Hub's errors."""
    from huggingface_hub import errors

    name = address.name
    if (told := refusal(error, "data set", name, address.revision)) is not None:
        return told
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UserError(f"{name} is read from the Hub while training, and HF_HUB_OFFLINE is set: unset it")
    return UserError(
        f"{name} could not be opened on the Hub ({first_line(error)[:120]}): check the network, and HF_ENDPOINT if it "
        "is set, or try again later"
    )


def _files(address: Address, info: Any) -> dict[str, list[HubFile]]:
    """The Parquet files of the set by split."""
    from huggingface_hub import hf_hub_url

    below = f"{address.folder}/" if address.folder else ""
    sizes = {file.rfilename: file.size for file in info.siblings or () if file.rfilename.startswith(below)}
    paths = [Path(name) for name in sorted(sizes) if name.endswith(".parquet")]
    paths = [path for path in paths if not any(map(is_litter, path.parts))]
    if not paths:
        hint = f"try hf://datasets/{address.name}@{CONVERTED}, where the Hub keeps a copy of many sets as Parquet"
        raise UserError(f"{address} holds no Parquet files: {hint}")
    homes = {path.parent.parent if split_of(path.parent.name, strict=True) else path.parent for path in paths}
    if len(homes) > 1:
        some = sorted(home.as_posix() for home in homes if home != Path())
        raise UserError(f"{address} holds several sets ({', '.join(some[:6])}): add one, as in {address}/{some[0]}")
    url = partial(hf_hub_url, address.name, repo_type="dataset", revision=address.revision, endpoint=endpoint())
    found = named_files(paths)
    return {
        split: [HubFile(path.as_posix(), url(path.as_posix()), sizes[path.as_posix()]) for path in found[split]]
        for split in SPLITS
        if split in found
    }


# ---- the rows of a split


def _table(address: Address, files: Sequence[HubFile]) -> Table:
    """The rows of a split that have a label."""
    cache = Cache(cache_folder() / "hub")
    with ThreadPoolExecutor(READERS) as pool:
        opened = [*pool.map(partial(_open, address, cache), files)]
    first = opened[0]
    for own in opened:
        if (own.images, own.names) != (first.images, first.names):
            raise UserError(f"{address}: {first.file.path} and {own.file.path} have other columns or classes: {REMEDY}")
    blocks = [block for number, own in enumerate(opened) for block in _blocks(number, own)]
    if (largest := max((block.bytes for block in blocks), default=0)) > WINDOW:
        size, most = f"{largest / 1e6:,.0f} MB", f"{WINDOW / 1e6:,.0f} MB"
        raise UserError(f"{address} has a row group of {size}, and at most {most} can be streamed: {REMEDY}")
    good = [known for own in opened for known in labelled(own.labels, first.names)]
    if missing := good.count(False):
        log.warning(f"{first.file.path}: {missing:,} of {len(good):,} rows have no label and are left out")
    block = torch.arange(len(blocks)).repeat_interleave(torch.tensor([each.rows for each in blocks], dtype=torch.int64))
    row = torch.cat([torch.arange(len(own.labels)) for own in opened])
    footers = [(own.file, own.metadata) for own in opened]
    images = Streamed(footers, first.images, blocks, block, row, cache).at(torch.tensor(good).nonzero()[:, 0])
    labels = [label for own in opened for label in own.labels.to_pylist()]
    keys = [f"{Path(own.file.path).stem}/{i}" for own in opened for i in range(len(own.labels))]
    return Table(images, [*compress(labels, good)], [*compress(keys, good)], first.names)


class Opened(NamedTuple):
    """A Parquet file with its labels read."""

    file: HubFile
    metadata: Any
    images: str
    """the column of the images' bytes, inside a struct with a dot"""
    labels: Any
    names: list[str] | None
    """of the classes"""


def _open(address: Address, cache: Cache, file: HubFile) -> Opened:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        footer, column = _read_labels(cache, file)
        parquet, labels = pq.ParquetFile(io.BytesIO(footer)), pa.ipc.open_stream(column).read_all()
    except pa.ArrowException as error:
        raise UserError(f"{file.path} of {address} cannot be read as Parquet: {first_line(error)[:160]}") from None
    schema, [label], [kind] = parquet.schema_arrow, labels.column_names, labels.schema.types
    image = choose_column(schema.names, IMAGES, file.path)
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{file.path} of {address}: the column {label} holds {kind}, and not one class per image")
    images = _image_bytes(file, image, schema.field(image).type)
    return Opened(file, parquet.metadata, images, labels.column(0), class_names(schema.metadata or {}, label))


def _read_labels(cache: Cache, file: HubFile) -> tuple[bytes, bytes]:
    """The footer of a file and, as Arrow's stream, its labels. The cache keeps them for other processes and runs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = name_of(file.url, LABELS)
    footer, labels = (cache.read(name, i, 2) for i in range(2))
    if footer is None or labels is None:
        parquet, end, column = pq.ParquetFile(Remote(file)), io.BytesIO(), io.BytesIO()
        label = choose_column(parquet.schema_arrow.names, LABELS, file.path)
        parquet.metadata.write_metadata_file(end)
        table = parquet.read(columns=[label], use_threads=False)
        with pa.ipc.new_stream(column, table.schema) as stream:
            stream.write_table(table)
        footer, labels = end.getvalue(), column.getvalue()
        cache.write(name, [footer, labels])
    return footer, labels


def _image_bytes(file: HubFile, column: str, kind: Any) -> str:
    """The name of the column with the bytes of the images."""
    import pyarrow as pa

    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{column}.bytes"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return column
    raise UserError(f"{file.path}: the column {column} holds {kind}, and only encoded images can be streamed")


def _blocks(number: int, opened: Opened) -> list[Block]:
    """The row groups of a file, small ones joined with their neighbours."""
    blocks: list[Block] = []
    first = 0
    for i in range(opened.metadata.num_row_groups):
        group = opened.metadata.row_group(i)
        columns = (group.column(place) for place in range(group.num_columns))
        size = sum(column.total_compressed_size for column in columns if column.path_in_schema == opened.images)
        if blocks and (last := blocks[-1]).bytes + size <= BLOCK:
            rows = last.rows + group.num_rows
            blocks[-1] = Block(number, (*last.groups, i), last.first, rows, last.bytes + size)
        else:
            blocks.append(Block(number, (i,), first, group.num_rows, size))
        first += group.num_rows
    return blocks
