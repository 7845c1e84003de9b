"""What retrieval takes beside the libraries it stands on, as ratios of one run.

    python benchmarks/retrieve.py --out retrieve.json                 # 100,000 documents: minutes
    python benchmarks/retrieve.py --out retrieve.json --documents 1000000

bm25    queries/s beside bare bm25s on the same documents and words, short queries and long conversations apart
exact   queries/s beside numpy's product with argpartition, and beside FAISS's flat index
near    approximate search: recall of the exact one and how many times its speed, 256 queries and one at a time
build   seconds by number of documents
memory  anonymous memory of a process that has searched

Documents are synthetic: words by Zipf's law, vectors in clusters. With --texts FILE (a text on each line) and --model,
approximate search is measured with a model's vectors of real texts too. Unset OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lavic.recommend.retrieval import RetrievalIndex
from lavic.recommend.retrieval.bm25.build import Bm25Builder, Bm25Settings
from lavic.recommend.retrieval.bm25.words import words_of
from lavic.recommend.retrieval.build import VectorBuilder, add_methods, prepare_index
from lavic.recommend.retrieval.item_table import Row
from lavic.recommend.retrieval.vectors.approximate import ApproximateSettings

VOCABULARY, WIDTH, K = 50_000, 384, 100
SHORT, LONG = 6, 150
"""Words of a query."""


def drawn_texts(count: int, words: int, seed: int) -> list[str]:
    """Texts of about so many words, by Zipf's law."""
    rng = np.random.default_rng(seed)
    numbers = np.minimum(rng.zipf(1.2, (count, words)), VOCABULARY)
    return [" ".join(f"w{number}" for number in row) for row in numbers.tolist()]


def drawn_vectors(count: int, seed: int) -> np.ndarray:
    """Vectors of length 1 in a thousand clusters."""
    centres = np.random.default_rng(99).normal(size=(1000, WIDTH)).astype(np.float32)
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(0, len(centres), count)]
    vectors += 0.7 * rng.standard_normal((count, WIDTH), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


clock: Callable[[], float] = time.perf_counter


def rates(searches: dict[str, Callable[[], Any]], queries: int, seconds: float) -> dict[str, float]:
    """Queries a second of each search, the best of several rounds, in which they take turns; at least three."""
    best, until, rounds = dict.fromkeys(searches, 0.0), time.perf_counter() + seconds * len(searches), 0
    while rounds < 3 or time.perf_counter() < until:
        for name, search in searches.items():
            started = clock()
            search()
            best[name] = max(best[name], queries / (clock() - started))
        rounds += 1
    return {name: round(value, 2) for name, value in best.items()}


def make(
    folder: Path, rows: list[Row], builders: list[Any], approximate: ApproximateSettings | None = None
) -> tuple[RetrievalIndex, float]:
    """An index, and how long it took."""
    started = clock()
    folder.mkdir(exist_ok=True)
    manifest, before = prepare_index(folder, lambda: rows, text={})
    add_methods(folder, manifest, builders, before, approximate=approximate)
    return RetrievalIndex.open(folder), round(clock() - started, 2)


def measure_bm25(folder: Path, count: int, seconds: float) -> dict[str, Any]:
    """Beside bare bm25s."""
    import bm25s

    texts = drawn_texts(count, 10, 1)
    index, built = make(folder, [Row(f"B{n:08d}", text) for n, text in enumerate(texts)], [Bm25Builder(Bm25Settings())])
    words = words_of()
    bare = bm25s.BM25(backend="auto")
    started = clock()
    bare.index([words(text) for text in texts], show_progress=False)
    found: dict[str, Any] = {
        "documents": count,
        "backend": bare.backend,
        "build_s": built,
        "bm25s_build_s": round(clock() - started, 2),
    }
    if bare.backend == "numba":
        bare.activate_numba_scorer()
    for name, length, number in (("short", SHORT, 64), ("long", LONG, 32)):
        queries = drawn_texts(number, length, 2)

        def ours(queries: list[str] = queries) -> Any:
            return index.search(queries, K, methods=["bm25"])

        def theirs(queries: list[str] = queries) -> Any:
            return bare.retrieve([words(query) for query in queries], k=K, show_progress=False)

        pair = rates({"lavic": ours, "bm25s": theirs}, number, seconds)
        found[name] = {**pair, "ratio": round(pair["lavic"] / pair["bm25s"], 3)}
    return found


def measure_exact(folder: Path, count: int, seconds: float) -> dict[str, Any]:
    """Beside numpy and FAISS's flat index."""
    import faiss

    faiss.omp_set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    vectors, queries = drawn_vectors(count, 1), drawn_vectors(64, 2)
    index, built = make(folder, _rows(count), [_builder(vectors)])
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(vectors)

    def numpy_search() -> Any:
        scores = queries @ vectors.T
        best = np.argpartition(scores, -K, axis=1)[:, -K:]
        return np.take_along_axis(best, np.argsort(np.take_along_axis(-scores, best, 1)), 1)

    searches = {
        "lavic": lambda: index.search_vectors("drawn", queries, K, exact=True),
        "numpy": numpy_search,
        "faiss_flat": lambda: flat.search(queries, K),
    }
    measured = rates(searches, 64, seconds)
    better = max(measured["numpy"], measured["faiss_flat"])
    return {"documents": count, "build_s": built, **measured, "ratio_to_better": round(measured["lavic"] / better, 3)}


def measure_near(folder: Path, vectors: np.ndarray, name: str, seconds: float) -> dict[str, Any]:
    """Approximate search beside the exact one, with queries that are not items."""
    held, items = vectors[::50][:256], np.delete(vectors, np.s_[::50], axis=0)
    index, built = make(folder, _rows(len(items)), [_builder(items)], ApproximateSettings(index=name))
    record = index.manifest.methods["drawn"].approximate or {}
    exact = index.search_vectors("drawn", held, K, exact=True)
    near = index.search_vectors("drawn", held, K)
    same = sum(len(set(a.ids) & set(b.ids)) for a, b in zip(exact, near, strict=True))
    searches = {
        "near": lambda: index.search_vectors("drawn", held, K),
        "exact": lambda: index.search_vectors("drawn", held, K, exact=True),
    }
    measured = rates(searches, len(held), seconds)
    single = rates(
        {
            name: lambda exact=name == "exact": [
                index.search_vectors("drawn", held[row : row + 1], K, exact=exact) for row in range(32)
            ]
            for name in searches
        },
        32,
        seconds,
    )
    return {
        "documents": len(items),
        "index": name,
        "build_s": built,
        "effort": record.get("effort"),
        "recall_in_manifest": record.get("recall"),
        "recall": round(same / sum(len(hits) for hits in exact), 4),
        "queries_per_s": measured["near"],
        "exact_queries_per_s": measured["exact"],
        "times_exact": round(measured["near"] / measured["exact"], 1),
        "single_queries_per_s": single["near"],
        "exact_single_queries_per_s": single["exact"],
        "times_exact_single": round(single["near"] / single["exact"], 1),
    }


def _rows(count: int) -> list[Row]:
    return [Row(f"B{n:08d}", f"{n}") for n in range(count)]


def _builder(vectors: np.ndarray) -> VectorBuilder:
    return VectorBuilder("drawn", {}, lambda: lambda texts: vectors[[int(text) for text in texts]])


_READER = """
import sys
import numpy as np
from lavic.recommend.retrieval import RetrievalIndex
index = RetrievalIndex.open(sys.argv[1])
if sys.argv[2] == "bm25":
    index.search(["w7 w19 w300 w12 w45"] * 64, 100, methods=["bm25"])
else:
    index.search_vectors("drawn", np.random.default_rng(0).normal(size=(64, 384)), 100, exact=sys.argv[2] == "exact")
lines = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
print(int(lines["Anonymous"].split()[0]) // 1024)
"""


def reader_memory(folder: Path, kind: str) -> int:
    """Anonymous memory, MiB, of a process that opened an index and searched it."""
    done = subprocess.run([sys.executable, "-c", _READER, folder, kind], capture_output=True, text=True, check=True)
    return int(done.stdout)


def main() -> None:
    """Measures and writes a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--near", default="auto", help="the approximate index, as --approximate.index")
    parser.add_argument("--parts", nargs="+", default=["bm25", "exact", "near"])
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--cpu", action="store_true", help="count CPU seconds of this process: for a busy machine")
    given = parser.parse_args()
    if given.cpu:
        globals()["clock"] = time.process_time
    root = Path(tempfile.mkdtemp(prefix="retrieve-"))
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads",
        "clock": "CPU" if given.cpu else "wall",
    }
    try:
        if "bm25" in given.parts:
            found["bm25"] = measure_bm25(root / "bm25", given.documents, given.seconds)
            found["bm25"]["reader_mib"] = reader_memory(root / "bm25", "bm25")
            _write(given.out, found)
        if "exact" in given.parts:
            found["exact"] = measure_exact(root / "exact", given.documents, given.seconds)
            found["exact"]["reader_mib"] = reader_memory(root / "exact", "exact")
            shutil.rmtree(root / "exact")
            _write(given.out, found)
        if "near" in given.parts:
            found["near"] = measure_near(root / "near", drawn_vectors(given.documents, 1), given.near, given.seconds)
            found["near"]["reader_mib"] = reader_memory(root / "near", "near")
            shutil.rmtree(root / "near")
            _write(given.out, found)
        if given.texts and given.model:
            from lavic.recommend.retrieval.vectors.sentence_encoder import (
                DenseSettings,
                SentenceEncoder,
                dense_settings,
            )

            texts = list(dict.fromkeys(given.texts.read_text("utf-8").splitlines()))
            encoder = SentenceEncoder(dense_settings(DenseSettings(model=given.model)))
            found["near_real"] = measure_near(root / "real", encoder.documents(texts), given.near, given.seconds)
            _write(given.out, found)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(json.dumps(found, indent=2))


def _write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
