"""Whether a vector database is there: one clear message before a search, no stack of causes.

Nothing of this library stands between an engine's client and its tables: these two functions look,
and hand back what the client gave.
"""

from __future__ import annotations

import importlib
from typing import Any

from matryoshkafy.errors import first_line
from matryoshkafy.serving.index import installed
from matryoshkafy.serving.vectors import ServingError

AVAILABLE = "SELECT default_version FROM pg_available_extensions WHERE name = 'vector'"


def postgres(address: str) -> Any:
    """Return a psycopg connection to a PostgreSQL that has pgvector at hand.

    Args:
        address: a connection string such as postgresql://localhost:5432/texts.

    Raises:
        ServingError: psycopg is not installed, no server answers, or the server lacks pgvector.
    """
    psycopg = installed("psycopg", "psycopg[binary]")
    try:
        connection = psycopg.connect(address, connect_timeout=5)
    except psycopg.OperationalError as error:
        raise ServingError(
            f"no PostgreSQL answers at {address} ({first_line(error)}). Start one, or without "
            "installing anything: pgserver.get_server(FOLDER).get_uri()"
        ) from error
    check_pgvector(connection)
    return connection


def check_pgvector(connection: Any) -> str:
    """Return the version of pgvector that a server has at hand.

    Args:
        connection: anything whose `execute(sql).fetchone()` asks the server.

    Raises:
        ServingError: the server has none.
    """
    found = connection.execute(AVAILABLE).fetchone()
    if found is None:
        raise ServingError(
            "this PostgreSQL has no pgvector. Install the package of your server's version (on "
            "Debian postgresql-16-pgvector), then CREATE EXTENSION vector; pgserver carries it"
        )
    return str(found[0])


def qdrant(address: str) -> Any:
    """Return a Qdrant client whose server answers.

    Args:
        address: a URL, a folder for the embedded mode, or ":memory:".

    Raises:
        ServingError: qdrant-client is not installed, or no server answers.
    """
    package = installed("qdrant_client", "qdrant-client")
    errors = importlib.import_module("qdrant_client.http.exceptions")
    if "://" not in address:
        where = {"location": address} if address == ":memory:" else {"path": address}
        return package.QdrantClient(**where)
    client = package.QdrantClient(url=address, timeout=5, check_compatibility=False)
    try:
        client.get_collections()
    except (errors.ResponseHandlingException, errors.UnexpectedResponse) as error:
        raise ServingError(
            f"no Qdrant answers at {address} ({first_line(error)}). Start one (docker run -p "
            '6333:6333 qdrant/qdrant), or give ":memory:" or a folder for the embedded mode'
        ) from error
    return client
