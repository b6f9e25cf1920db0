"""FHIR R4: the texts of DocumentReference and DiagnosticReport, from bundles and bulk exports."""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from html import unescape
from typing import Any

KINDS = ("DocumentReference", "DiagnosticReport")
TAG = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>|<[^<>]*>|&(?:#\w{1,8}|\w{1,31});", re.S | re.I)
BREAK = re.compile(r"</?(?:p|br|div|li|tr|h[1-6]|table|ul|ol)\b", re.I)
"""Tags that end a line."""


def resources_of(content: Mapping[str, Any]) -> Iterator[tuple[int | None, Any]]:
    """The resources of a bundle with their numbers, or the one that it is."""
    if content.get("resourceType") != "Bundle":
        yield None, content
        return
    entries = content.get("entry") or []
    for number, entry in enumerate(entries if isinstance(entries, list) else [], start=1):
        yield number, entry.get("resource") if isinstance(entry, dict) else None


def documents_of(resource: Any) -> Iterator[dict[str, Any] | str]:
    """Of each text in a resource the values of a note, or why it is left out."""
    if not isinstance(resource, dict):
        yield "resource: missing"
        return
    kind = resource.get("resourceType")
    if kind not in KINDS:
        yield f"resourceType: got {str(kind)[:40]!r}, expected {' or '.join(KINDS)}"
        return
    if "entered-in-error" in (resource.get("docStatus"), resource.get("status")):
        yield "docStatus: entered in error"
        return
    try:
        values = values_of(resource)
        attachments = list(attachments_of(resource))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        yield f"{kind}: {error}" if isinstance(error, ValueError) else f"{kind}: not as FHIR R4 has it"
        return
    if not attachments:
        yield "content: no attachment"
    for number, attachment in enumerate(attachments):
        name = values["note_id"] + (f"#{number}" if number else "")
        try:
            yield values | {"note_id": name} | text_of(attachment)
        except ValueError as error:
            yield str(error)


def values_of(resource: Mapping[str, Any]) -> dict[str, Any]:
    """All but the text. Raises ValueError."""
    if not isinstance(resource.get("id"), str) or not resource["id"]:
        raise ValueError("id: missing")
    subject = (resource.get("subject") or {}).get("reference", "")
    if not subject:
        raise ValueError("subject.reference: missing")
    context = resource.get("context") or {}
    encounters = context.get("encounter") or ([resource["encounter"]] if "encounter" in resource else [])
    replaced = [
        tail(one["target"]["reference"]) for one in resource.get("relatesTo") or [] if one.get("code") == "replaces"
    ]
    code = resource.get("type") or resource.get("code") or {}
    kinds = [one.get("display") or one.get("code") or "" for one in code.get("coding") or []]
    return {
        "patient_id": tail(subject),
        "note_id": resource["id"],
        "date": str(resource.get("date") or resource.get("effectiveDateTime") or resource.get("issued") or ""),
        "note_type": code.get("text") or next(iter(kinds), ""),
        "encounter_id": tail(encounters[0]["reference"]) if encounters else "",
        "replaces": tuple(replaced),
    }


def tail(reference: str) -> str:
    """The id at the end of `Patient/7`, or of a whole address."""
    return reference.rstrip("/").rsplit("/", 1)[-1].removeprefix("urn:uuid:")


def attachments_of(resource: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The attachments of either kind of resource."""
    for one in resource.get("content") or []:
        yield one["attachment"]
    yield from resource.get("presentedForm") or []


def text_of(attachment: Mapping[str, Any]) -> dict[str, Any]:
    """The text of an attachment. Raises ValueError where it cannot be read."""
    kind, _, rest = str(attachment.get("contentType", "text/plain")).lower().partition(";")
    kind = kind.strip()
    if kind not in ("text/plain", "text/html"):
        raise ValueError(f"contentType: got {kind[:40]!r}, expected text/plain or text/html")
    if "data" not in attachment:
        raise ValueError("attachment: no data; one behind an address is not read")
    charset = re.search(r"charset=\"?([\w-]+)", rest)
    try:
        raw = base64.b64decode(attachment["data"], validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError("attachment.data: not base64") from error
    try:
        text = raw.decode(charset[1] if charset else "utf-8")
    except (UnicodeDecodeError, LookupError) as error:
        raise ValueError(f"attachment.data: not {charset[1] if charset else 'utf-8'}") from error
    if kind == "text/plain":
        return {"text": text}
    shown, places = text_of_html(text)
    return {"text": shown, "raw_places": tuple(places)}


def text_of_html(html: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without tags, and from each first place of a piece on, where that begins in the raw document."""
    pieces: list[str] = []
    places: list[tuple[int, int]] = []
    length = at = 0

    def add(piece: str, raw: int) -> None:
        nonlocal length
        if piece:
            places.append((length, raw))
            pieces.append(piece)
            length += len(piece)

    for match in TAG.finditer(html):
        add(html[at : match.start()], at)
        found = match.group()
        if found.startswith("&"):
            add(unescape(found), match.start())
        elif BREAK.match(found):
            add("\n", match.start())
        at = match.end()
    add(html[at:], at)
    return "".join(pieces), places


def raw_place(places: list[tuple[int, int]] | tuple[tuple[int, int], ...], place: int, *, last: bool = False) -> int:
    """Where a character of the text stands in the raw document; `last`: the place behind it, for an end."""
    if not places:
        return place
    from bisect import bisect_right

    wanted = place - 1 if last else place
    text, raw = places[max(0, bisect_right(places, (wanted, 1 << 62)) - 1)]
    return raw + wanted - text + (1 if last else 0)
