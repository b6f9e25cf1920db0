"""What may go into an index, and which folder it may go to."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from protocols.errors import BadInput, Corrupt
from protocols.retriever import Document, IndexRequest, RetrieverConfig

MANIFEST, SHARDS = "index.json", "shards.json"


def check(request: IndexRequest) -> None:
    """Raise BadInput for documents that cannot be kept, or of which it is not clear what becomes of them."""
    named = Counter(one.id for one in request.documents)
    for name in request.remove:
        if name in named:
            raise BadInput(f"remove: got {name!r}, which is among the documents; expected one or the other")
    for name, count in named.items():
        if count > 1:
            raise BadInput(f"documents: got the id {name!r} {count} times, expected each once")
    for document in request.documents:
        for field, text in [("text", document.text), *_metadata(document)]:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise BadInput(
                    f"documents: {document.id!r}: {field}: got half of a surrogate pair as character {error.start},"
                    " expected Unicode text"
                ) from None


def _metadata(document: Document) -> Iterator[tuple[str, str]]:
    for key, value in document.metadata.items():
        yield "metadata", key
        yield "metadata", value


def identity(config: RetrieverConfig) -> str:
    """What all that is in an index depends on."""
    encoder = "" if config.kind == "bm25" else config.encoder
    return json.dumps({"kind": config.kind, "encoder": encoder})


def claim(folder: Path, config: RetrieverConfig) -> None:
    """Make sure that a folder is empty, or holds an index of this kind. Raises BadInput or Corrupt otherwise."""
    wanted = identity(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST).exists():
            if any(not one.name.startswith(".") for one in folder.iterdir()):
                raise BadInput(f"path: got {str(folder)!r}, which holds something else; expected an index")
            write_atomically(folder / MANIFEST, wanted)
        found = json.loads((folder / MANIFEST).read_text("utf-8"))
    except OSError as error:
        raise BadInput(f"path: got {str(folder)!r}, expected a folder that can be used: {error}") from error
    except ValueError as error:
        raise Corrupt(f"{folder / MANIFEST} is damaged: {error}") from error
    for field, value in json.loads(wanted).items():
        if found.get(field) != value:
            raise BadInput(f"{field}: got {value!r}, expected {found.get(field)!r}, as the index in {folder} has it")


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def shard_of(name: str, shards: int) -> int:
    """Which shard has the document of this id."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") % shards


def check_shards(folder: Path, shards: int) -> None:
    """Raise BadInput if the documents of a folder are spread over another number of shards."""
    file = folder / SHARDS
    found = 1 if (folder / MANIFEST).exists() else json.loads(file.read_text("utf-8")) if file.exists() else shards
    if found != shards:
        raise BadInput(f"shards: got {shards}, expected {found}, as the index in {folder} has it")


def claim_shards(folder: Path, shards: int) -> None:
    """Note that the documents of a folder are spread over so many shards. Raises BadInput as `check_shards` does."""
    check_shards(folder, shards)
    write_atomically(folder / SHARDS, json.dumps(shards))
