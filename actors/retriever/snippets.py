"""Snippets of documents around the matches of patterns."""

from collections.abc import Iterator

from actors.retriever.pattern import searcher
from actors.retriever.sections import Sections
from actors.retriever.windows import Edges, windows
from protocols.retriever import Document, Match, Snippet, SnippetsRequest, Window


def snippets(request: SnippetsRequest) -> list[Snippet]:
    """What is found, in the order of documents, sets and places. Raises BadInput for a pattern that is none."""
    looking = searcher(request.sets)
    names = [one.id for one in request.sets]
    return [
        snippet
        for document in request.documents
        if (found := looking.found(document.text))
        for snippet in _of(document, {names[s]: matches for s, matches in found.items()}, request.window)
    ]


def _of(document: Document, found: dict[str, list[Match]], window: Window) -> Iterator[Snippet]:
    edges, sections = Edges(document.text), Sections(document.text)
    for name, matches in found.items():
        for (start, end), inside in windows(edges, matches, window):
            yield Snippet(
                document=document.id,
                set=name,
                start=start,
                end=end,
                text=document.text[start:end],
                matches=inside,
                section=sections.at(inside[0].start),
            )
