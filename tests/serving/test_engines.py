"""Two-stage search in real engines gives the ten documents that ours gives: their clients, our
vectors, the same plan of stages.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from matryoshkafy.serving import ServingError, Vectors, engines, funnel

SIZES, SHORT, WIDTH, KEEP, K, QUERIES = (8, 32), 8, 32, 100, 10, 500


def table(rows: int, seed: int) -> Vectors:
    values = np.random.default_rng(seed).normal(size=(rows, WIDTH))
    return Vectors(values / np.arange(1, WIDTH + 1) ** 0.5, SIZES, "m")


@pytest.fixture(scope="module")
def documents() -> Vectors:
    return table(2000, 0)


@pytest.fixture(scope="module")
def queries() -> Vectors:
    return table(QUERIES, 1)


@pytest.fixture(scope="module")
def wanted(queries: Vectors, documents: Vectors) -> np.ndarray:
    return funnel(queries, documents, sizes=SIZES, keep=[KEEP, K]).ids


SCHEMA = f"""
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE documents (id int PRIMARY KEY, embedding vector({WIDTH}));
"""
# The index stands on an expression: nothing is stored twice, and the order by uses it. pgvector 0.7
# calls it subvector(embedding, 1, 8); the array's slice below is known to older ones, too.
PREFIX = f"((embedding::real[])[1:{SHORT}]::vector({SHORT}))"
INDEX = f"""
CREATE INDEX ON documents
USING hnsw ({PREFIX} vector_cosine_ops);
"""
TWO_STAGES = f"""
SELECT id FROM (
    SELECT id, embedding FROM documents
    ORDER BY {PREFIX} <=> %(short)s::vector({SHORT})
    LIMIT {KEEP}
) AS shortlist
ORDER BY embedding <=> %(whole)s::vector({WIDTH}) LIMIT {K};
"""


def test_postgres_with_pgvector(queries, documents, wanted, tmp_path: Path) -> None:
    pgserver = pytest.importorskip("pgserver", reason="pgserver is not installed")
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    server = pgserver.get_server(tmp_path / "data", cleanup_mode="stop")
    try:
        with engines.postgres(server.get_uri()) as connection:
            connection.execute(SCHEMA)
            with connection.cursor().copy("COPY documents FROM STDIN") as copy:
                for i, row in enumerate(documents.values):
                    copy.write_row((i, str(row.tolist())))
            found = np.array([asked(connection, row) for row in queries.values])
            assert np.array_equal(found, wanted)
            connection.execute(INDEX)
            connection.execute("SET enable_seqscan = off; SET hnsw.ef_search = 400")
            plan = connection.execute("EXPLAIN " + TWO_STAGES, arguments(queries.values[0]))
            assert "Index Scan" in "\n".join(line for (line,) in plan)
            fast = np.array([asked(connection, row) for row in queries.values])
        assert (fast[:, :, None] == wanted[:, None, :]).any(2).mean() > 0.98
    finally:
        server.cleanup()


def arguments(row: np.ndarray) -> dict[str, str]:
    return {"short": str(row[:SHORT].tolist()), "whole": str(row.tolist())}


def asked(connection, row: np.ndarray) -> list[int]:
    return [i for (i,) in connection.execute(TWO_STAGES, arguments(row)).fetchall()]


def test_qdrant(queries, documents, wanted) -> None:
    client_of = pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")
    models = client_of.models
    client = engines.qdrant(":memory:")
    cosine = models.Distance.COSINE
    client.create_collection(
        "documents",
        vectors_config={
            str(size): models.VectorParams(size=size, distance=cosine) for size in SIZES
        },
    )
    points = [
        models.PointStruct(id=i, vector={str(size): row[:size].tolist() for size in SIZES})
        for i, row in enumerate(documents.values)
    ]
    client.upsert("documents", points)
    found = [
        [
            point.id
            for point in client.query_points(
                "documents",
                prefetch=models.Prefetch(query=row[:SHORT].tolist(), using=str(SHORT), limit=KEEP),
                query=row.tolist(),
                using=str(WIDTH),
                limit=K,
            ).points
        ]
        for row in queries.values
    ]
    assert np.array_equal(np.array(found), wanted)


def test_lancedb(queries, documents, wanted, tmp_path: Path) -> None:
    lancedb = pytest.importorskip("lancedb", reason="lancedb is not installed")
    database = lancedb.connect(tmp_path / "data")
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    columns = {
        name: arrow.FixedSizeListArray.from_arrays(arrow.array(part.ravel()), part.shape[1])
        for name, part in (("short", documents.values[:, :SHORT]), ("whole", documents.values))
    }
    rows = arrow.table({"id": np.arange(len(documents)), **columns})
    stored = database.create_table("documents", rows)
    for row, ids in zip(queries.values[:50], wanted, strict=False):
        search = stored.search(row[:SHORT], vector_column_name="short").distance_type("cosine")
        shortlist = search.limit(KEEP).to_list()
        whole = np.array([item["whole"] for item in shortlist])
        scores = whole @ row / np.linalg.norm(whole, axis=1)
        best = np.argsort(-scores, kind="stable")[:K]
        assert [shortlist[i]["id"] for i in best] == ids.tolist()


def test_faiss_on_disk(queries, documents, wanted, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    index = faiss.IndexFlatIP(SHORT)
    index.add(documents.at(SHORT))
    faiss.write_index(index, str(tmp_path / "short.faiss"))
    mapped = faiss.read_index(str(tmp_path / "short.faiss"), faiss.IO_FLAG_MMAP)
    shortlist = mapped.search(queries.at(SHORT), KEEP)[1]
    whole, asked_whole = documents.at(WIDTH), queries.at(WIDTH)
    scores = np.einsum("qd,qkd->qk", asked_whole, whole[shortlist])
    best = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    assert np.array_equal(np.take_along_axis(shortlist, best, axis=1), wanted)


def test_an_engine_that_is_not_running_is_named_with_the_remedy() -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")
    # Port 1 of this machine: nobody listens.
    with pytest.raises(ServingError, match="no PostgreSQL answers at .*Start one, or without"):
        engines.postgres("postgresql://127.0.0.1:1/texts")
    with pytest.raises(ServingError, match="no Qdrant answers at .*Start one .*embedded mode"):
        engines.qdrant("http://127.0.0.1:1")


def test_a_server_without_pgvector_is_named_with_the_remedy() -> None:
    class Without:
        def execute(self, sql: str):
            assert "pg_available_extensions" in sql
            return self

        def fetchone(self):
            return None

    with pytest.raises(ServingError, match="has no pgvector. Install .* CREATE EXTENSION vector"):
        engines.check_pgvector(Without())


def test_a_client_that_is_not_installed_is_named_with_the_remedy(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ServingError, match="pip install psycopg\\[binary\\]"):
        engines.postgres("postgresql://127.0.0.1:1/texts")
