"""Approximate search by FAISS, measured against the exact one when it is made.

FAISS proposes rows, with vectors that it keeps in its own, smaller form; their scores are computed again from the
vectors. Its files are mapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PositiveInt

from lavic.config import flatten, settings
from lavic.errors import ConfigError, DataError, LaunchError, first_line
from lavic.recommend.retrieval.manifest import MethodRecord, Shard
from lavic.recommend.retrieval.vectors.chunks import VectorFiles
from lavic.storage.atomic import atomic_open
from lavic.storage.checksummed_json import digest_json

AUTO, EXACT = "auto", "exact"
_SAMPLE = 128
"""Items whose vectors are the queries that recall is measured with."""
_MAX_EFFORT = 1 << 14
_TRAINING = 64
"""Vectors for each list of an inverted file, at most, that its centres are made from."""


@settings
class ApproximateSettings:
    """Approximate search among vectors."""

    index: str | None = None
    """`auto` for an inverted file of a size that fits the catalogue, or an index in the words of FAISS's index_factory,
    such as IVF4096,SQ8 or HNSW32,SQ8; `exact` for none. By default an index stays as it is, and a new one is exact."""
    recall: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of the exact search's items to be found: the smallest effort (nprobe, efSearch; to about an eighth) that
    reaches it with a sample of the items as queries is chosen and recorded with what it reached."""
    k: PositiveInt = 100
    """Length of the lists that recall is measured with."""
    part_rows: PositiveInt = 1 << 20
    """Items of a file."""


def with_approximate(folder: Path, record: MethodRecord, chosen: ApproximateSettings, rank: np.ndarray) -> MethodRecord:
    """A method's record with the wanted approximate search, which is built if it does not exist or is damaged.

    Args:
        folder: The index.
        record: Of a method with vectors, all of whose files stand.
        chosen: What is wanted.
        rank: Place of each row's id in the order of ids.

    Raises:
        ConfigError: FAISS does not know such an index.
        LaunchError: It is not installed.
    """
    if searches_as(record, chosen) and approximate_is_whole(folder, record):
        return record
    if chosen.index == EXACT:
        return replace(record, approximate=None)
    recorded = flatten(chosen)
    vectors = VectorFiles(folder, record)
    source = digest_json({"files": [file.source for file in record.files], "settings": recorded})
    files = []
    for number, start in enumerate(range(0, len(vectors), chosen.part_rows)):
        rows = min(chosen.part_rows, len(vectors) - start)
        stem = f"{record.files[0].name.partition('-')[0]}-near-{number:05d}-{source[:16]}"
        path = _whole_file(folder, stem) or _write(folder, stem, vectors, start, rows, str(chosen.index))
        files.append({"name": path.name, "start": start, "rows": rows, "bytes": path.stat().st_size})
    approximate = {"settings": recorded, "files": files, "effort": 1}
    return replace(record, approximate={**approximate, **_measure(folder, vectors, approximate, chosen, rank)})


def searches_as(record: MethodRecord, chosen: ApproximateSettings) -> bool:
    """Whether a method is already searched as it is wanted."""
    if chosen.index is None:
        return True
    if record.approximate is None or chosen.index == EXACT:
        return record.approximate is None and chosen.index == EXACT
    return bool(record.approximate["settings"] == flatten(chosen))


def approximate_is_whole(folder: Path, record: MethodRecord) -> bool:
    """Whether the files of a method's approximate search are there and whole."""
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in _sizes(record).items()
    )


def _sizes(record: MethodRecord) -> dict[str, int]:
    """The files of a method's approximate search, with their bytes."""
    return {file["name"]: file["bytes"] for file in (record.approximate or {}).get("files", ())}


class Approximate:
    """Finds rows that are likely among the best of a query.

    Raises:
        DataError: A file is missing or cut short.

    Attributes:
        files: The rows of each file.
        effort: nprobe or efSearch, for lists as long as those that recall was measured with.
    """

    def __init__(self, folder: Path, approximate: Mapping[str, Any], shard: Shard = (0, 1)) -> None:
        part, parts = shard
        count = len(approximate["files"])
        self._indexes = [
            (range(file["start"], file["start"] + file["rows"]), _open(folder / file["name"], file["bytes"]))
            for file in approximate["files"][part * count // parts : (part + 1) * count // parts]
        ]
        self.files = tuple(file for file, _ in self._indexes)
        self._measured_k = int(approximate["settings"]["k"])
        self.effort = int(approximate["effort"])

    def propose(self, queries: np.ndarray, k: np.ndarray) -> Iterator[tuple[range, list[np.ndarray]]]:
        """The rows of each file, and those of them among which most of a query's k best are.

        Longer lists than those that recall was measured with take more effort, in proportion. The effort is doubled
        until k rows are found. What is found for a query does not depend on the others.

        Args:
            queries: float [queries, width]
            k: int [queries]

        Yields:
            A file's rows, and for each query int64 [some].
        """
        num_proposals = _proposals(k)
        factors = np.maximum(1, np.rint(k / self._measured_k)).astype(np.int64)
        for file, index in self._indexes:
            rows = [np.zeros(0, np.int64)] * len(queries)
            for factor in np.unique(factors).tolist():
                pending = np.flatnonzero(factors == factor)
                width = min(int(num_proposals[pending].max()), index.ntotal)
                can_find_more = True
                while can_find_more and len(pending):
                    can_find_more = self._set_effort(index, factor)
                    _, proposed = index.search(np.ascontiguousarray(queries[pending]), width)
                    for number, proposals in zip(pending.tolist(), proposed, strict=True):
                        first = proposals[: num_proposals[number]]
                        rows[number] = first[first >= 0] + file.start
                    pending = pending[[len(rows[number]) < min(k[number], index.ntotal) for number in pending]]
                    factor *= 2
            yield file, rows

    def _set_effort(self, index: Any, factor: int) -> bool:
        """Sets so many times the effort; returns whether more of it could find more."""
        effort = self.effort * factor
        if _is_inverted(index):
            lists = _faiss().extract_index_ivf(index)
            lists.nprobe = min(effort, lists.nlist)
            return bool(effort < lists.nlist)
        if hasattr(index, "hnsw"):  # at least what the longest of these lists proposes
            index.hnsw.efSearch = max(effort, int(_proposals(self._measured_k * (2 * factor + 1) // 2)))
            return bool(index.hnsw.efSearch < index.ntotal)
        return False


def _proposals(k: Any) -> Any:
    """Rows that FAISS proposes for lists of k: its scores are of shortened numbers, so some have changed places."""
    return k + k // 8 + 10


def _whole_file(folder: Path, stem: str) -> Path | None:
    """A file that was written before. Its name ends in its size, which tells that it is whole."""
    return next((path for path in folder.glob(f"{stem}-*.faiss") if path.stem == f"{stem}-{path.stat().st_size}"), None)


def _write(folder: Path, stem: str, vectors: VectorFiles, start: int, rows: int, name: str) -> Path:
    faiss = _faiss()
    num_lists = max(1, min(int(2 * rows**0.5), rows // 39))  # 39: FAISS's own least
    factory_string = f"IVF{num_lists},SQ8" if name == AUTO else name
    try:
        index = faiss.index_factory(vectors.width, factory_string, faiss.METRIC_INNER_PRODUCT)
        count = min(rows, _TRAINING * _lists(index, num_lists))
        index.train(vectors.rows(start + np.arange(count) * rows // count))
        for first in range(start, start + rows, 1 << 16):
            index.add(vectors.rows(np.arange(first, min(first + (1 << 16), start + rows))))
    except RuntimeError as error:
        raise ConfigError(f"--approximate.index {name}: {first_line(error)}") from None
    written = folder / f"{stem}-new.faiss"
    with atomic_open(written) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
    return written.replace(folder / f"{stem}-{written.stat().st_size}.faiss")


def _lists(index: Any, default: int) -> int:
    return int(_faiss().extract_index_ivf(index).nlist) if _is_inverted(index) else default


def _is_inverted(index: Any) -> bool:
    return _faiss().try_extract_index_ivf(index) is not None


def _open(path: Path, size: int) -> Any:
    faiss = _faiss()
    try:
        if path.stat().st_size != size:
            raise DataError(f"{path}: cut short: run the same `lavic retrieve` again to make it again")
        flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
        index = faiss.read_index(str(path), flags)
        return index if _is_inverted(index) else faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except FileNotFoundError:
        raise DataError(f"{path}: missing: run the same `lavic retrieve` again to make it") from None
    except RuntimeError as error:
        raise DataError(
            f"{path}: cannot be read ({first_line(error)}): remove it and run the same `lavic retrieve` again"
        ) from None


def _measure(
    folder: Path, vectors: VectorFiles, record: Mapping[str, Any], chosen: ApproximateSettings, rank: np.ndarray
) -> dict[str, Any]:
    """The smallest effort that reaches the wanted recall, and what each reached."""
    from lavic.recommend.retrieval.vectors.search import VectorSearch

    queries = vectors.rows(np.linspace(0, len(vectors) - 1, min(_SAMPLE, len(vectors))).astype(np.int64))
    k = [chosen.k] * len(queries)
    exact = VectorSearch(vectors, rank).search(queries, k)
    approximate = Approximate(folder, record)
    reached: dict[int, float] = {}

    def reaches_recall(effort: int) -> bool:
        approximate.effort = effort
        rows = VectorSearch(vectors, rank, approximate).search(queries, k)
        reached[effort] = round(_recall(exact, rows), 4)
        return reached[effort] >= chosen.recall

    effort = 1
    while not reaches_recall(effort) and effort < _MAX_EFFORT:
        effort *= 2
    too_little = effort // 2
    while effort - too_little > max(1, effort // 8):
        middle = (effort + too_little) // 2
        if reaches_recall(middle):
            effort = middle
        else:
            too_little = middle
    by_effort = {str(tried): recall for tried, recall in sorted(reached.items())}
    return {"effort": effort, "recall": reached[effort], "recall_by_effort": by_effort, "k": chosen.k}


def _recall(exact: Sequence[tuple[np.ndarray, np.ndarray]], other: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Share of the exact search's rows that the other found."""
    num_exact = sum(len(rows) for rows, _ in exact)
    num_found = sum(len(np.intersect1d(a, b)) for (a, _), (b, _) in zip(exact, other, strict=True))
    return num_found / num_exact if num_exact else 1.0


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise LaunchError(f"approximate search needs pip install 'lavic[retrieve]' ({error})") from None
    return faiss
