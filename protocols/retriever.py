"""The retriever: keeps documents and finds them by words or meaning, and cuts snippets around patterns."""

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from protocols.placement import Resources
from protocols.service import Empty, Message, Service, rpc

Kind = Literal["pattern", "bm25", "dense", "hybrid"]


class RetrieverConfig(Message):
    """A retriever actor."""

    kind: Kind = "bm25"
    """What it can do beside `snippets`, which each one does. `pattern`: nothing, it keeps no index. `bm25`: search by
    words. `dense`: by the cosine of embeddings. `hybrid`: by both, their ranks fused."""
    path: str = ""
    """Folder of the index. One that is there is opened by memory map; what is indexed stays there. Empty: a folder
    of its own that ends with the actor."""
    encoder: str = "minilm"
    """Of dense and hybrid: Hugging Face name or folder of a sentence encoder, or `minilm`: the packaged
    all-MiniLM-L6-v2 (extra `minilm`)."""
    max_tokens: int = Field(default=256, ge=8)
    """Of dense and hybrid: a longer text is cut at its end before it is embedded."""
    fusion: float = Field(default=60.0, ge=0)
    """Of hybrid: constant c of reciprocal rank fusion, the sum over rankings of 1 / (c + rank) (Cormack et al.
    2009)."""
    device: str = "auto"
    """Of dense and hybrid: torch device; `auto` is CUDA when there is one, else the CPU."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of the encoder; 0: as many as this process may use."""
    shards: int = Field(default=1, ge=1)
    """Actors over which the documents are spread by a hash of their ids; each asks its own part, and the best of all
    are the answer. BM25 then counts words within a shard, so that scores differ a little from those of one index."""
    resources: Resources = Resources(cpus=1)
    """What one replica, or one shard, takes on a cluster."""

    @model_validator(mode="after")
    def _one_index(self) -> Self:
        if self.resources.replicas > 1 and self.kind != "pattern":
            raise ValueError("resources.replicas: each would have an index of its own; use shards, or kind=pattern")
        if self.shards > 1 and self.kind == "pattern":
            raise ValueError("shards: kind=pattern keeps no index; use resources.replicas")
        return self


class Document(Message):
    """A text that can be found."""

    id: str = Field(min_length=1)
    """Its name; a document with the same one replaces it."""
    text: str
    """All of it."""
    metadata: dict[str, str] = {}
    """What a search may be narrowed by."""


class IndexRequest(Message):
    """Changes what is kept; all of it, or nothing."""

    documents: list[Document] = []
    """Added, in the place of those with the same ids."""
    remove: list[str] = []
    """Ids of documents to forget; unknown ones are passed over."""


class IndexResponse(Message):
    """What a change came to."""

    added: int
    """Documents that are new."""
    replaced: int
    """Documents in the place of older ones."""
    removed: int
    """Documents that were forgotten."""
    documents: int
    """Documents that are kept now."""


class Values(Message):
    """Values of a key, one of which a document must have. Written as a list where it is one."""

    values: list[str] = Field(min_length=1)
    """Compared as they are."""

    @model_validator(mode="before")
    @classmethod
    def _of_list(cls, given: Any) -> Any:
        return {"values": given} if isinstance(given, list | tuple) else given


class SearchRequest(Message):
    """Asks for the documents that are nearest to queries."""

    queries: list[str] = Field(min_length=1)
    """Words, or a text whose meaning is looked for. Nothing in them is syntax."""
    k: int = Field(default=10, ge=1, le=10_000)
    """Most hits for each query."""
    kind: Literal["bm25", "dense", "hybrid"] | None = None
    """Another ranking than the configured one, as far as a hybrid retriever has it."""
    where: dict[str, Values] = {}
    """Only documents whose metadata have, for each key, one of these values."""


class Hit(Message):
    """A document that was found."""

    id: str
    """Its name."""
    text: str
    """All of it."""
    metadata: dict[str, str] = {}
    """As it was indexed."""
    score: float
    """Higher is nearer: BM25, cosine, or the sum of reciprocal ranks."""
    ranks: dict[str, int] = {}
    """Of hybrid: its place in each ranking that has it, from 1."""


class SearchResult(Message):
    """The hits of one query."""

    hits: list[Hit]
    """Best first; equal scores in the order of their ids."""


class SearchResponse(Message):
    """What was found."""

    results: list[SearchResult]
    """In the order of the queries."""


class Pattern(Message):
    """A regular expression in RE2's syntax, which is matched in time linear to the text: its first 64 matches in a
    document may have any length; further ones span at most 4,096 bytes of UTF-8, context included."""

    expression: str = Field(min_length=1)
    """Without look-around and back-references, which RE2 does not have. Where it has a group, that is the match, and
    what is around it is context that must be there."""
    case_sensitive: bool = False
    """Whether case counts, as in abbreviations."""


class PatternSet(Message):
    """What to look for together."""

    id: str = Field(min_length=1)
    """Names it in snippets and errors."""
    include: list[Pattern] = Field(min_length=1)
    """What is looked for."""
    exclude: list[Pattern] = []
    """A match that overlaps a match of one of these does not count."""


class Window(Message):
    """How much text around matches is cut out."""

    characters: int = Field(default=250, ge=0)
    """To each side of a match; windows that overlap or touch are one."""
    snap: int = Field(default=80, ge=0)
    """Edges move outward to the end of a sentence or line, if there is one within so many characters."""
    max_characters: int = Field(default=1200, ge=1)
    """Longer spans are cut between matches, never within one; text that is too far from one is left out."""


class SnippetsRequest(Message):
    """Asks where patterns occur in documents that need not be indexed."""

    documents: list[Document] = []
    """Texts to read. None: the patterns are checked, and that is all."""
    sets: list[PatternSet] = Field(min_length=1)
    """Each is looked for on its own, in one pass over the texts."""
    window: Window = Window()
    """Shared by all."""


class Match(Message):
    """Where a pattern occurs."""

    start: int
    """First character in the document."""
    end: int
    """Behind its last character."""
    pattern: Annotated[int, Field(ge=0)]
    """Its place in `include`."""


class Snippet(Message):
    """A part of a document around matches. Places count Unicode code points of the document's text."""

    document: str
    """Its id."""
    set: str
    """What was looked for."""
    start: int
    """First character in the document."""
    end: int
    """Behind its last character: `text` is `document.text[start:end]`."""
    text: str
    """What stands there."""
    matches: list[Match]
    """In order of their places."""
    section: str = ""
    """Header of the section in which the first match stands; empty if there is none."""


class SnippetsResponse(Message):
    """The snippets."""

    snippets: list[Snippet]
    """In the order of documents, then sets, then places."""


class RetrieverInfo(Message):
    """Facts about a retriever."""

    kind: Kind
    """What it can do."""
    documents: int
    """How many it keeps."""
    encoder: str = ""
    """Its encoder; empty without one."""
    dimensions: int = 0
    """Length of its vectors."""
    shards: int = 1
    """Over how many actors its documents are spread."""


class RetrieverService(Service):
    """Finds text."""

    kind: ClassVar[str] = "retriever"

    @rpc(safe=True)
    @abstractmethod
    async def info(self, request: Empty) -> RetrieverInfo:
        """Facts about the retriever."""

    @rpc(safe=True, role="train")
    @abstractmethod
    async def index(self, request: IndexRequest) -> IndexResponse:
        """Add, replace and forget documents. Raises BadInput where it keeps no index."""

    @rpc(safe=True)
    @abstractmethod
    async def search(self, request: SearchRequest) -> SearchResponse:
        """Find the nearest documents. Raises BadInput where it has no such ranking."""

    @rpc(safe=True)
    @abstractmethod
    async def snippets(self, request: SnippetsRequest) -> SnippetsResponse:
        """Find patterns in texts. Raises BadInput, naming the pattern, for one that does not compile, that matches
        the empty string, or whose automaton is too large."""
