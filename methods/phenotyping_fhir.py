"""FHIR R4: the texts of DocumentReference and DiagnosticReport, from bundles and bulk exports."""

import base64
import binascii
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from html import unescape
from typing import Any

KINDS = ("DocumentReference", "DiagnosticReport")
HIDING = re.compile(r"<(!--|script\b|style\b)", re.I | re.A)
"""What begins something that is not shown up to its end."""
HIDDEN_TO = {
    "!--": re.compile(r"-->"),
    "script": re.compile(r"</script\s*>", re.I | re.A),
    "style": re.compile(r"</style\s*>", re.I | re.A),
}
TAG = re.compile(r"</?[a-z][^<>]*>|<!(?!--)[^<>]*>|<\?[a-z][^<>]*\?>", re.I | re.A)
"""A `<` before anything else is text, as in `PE <40`."""
MARK = re.compile(rf"{HIDING.pattern}|{TAG.pattern}|&(?:#\w{{1,8}}|\w{{1,31}});", re.I | re.A)
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
    except ValueError as error:
        yield f"{kind}: {error}"
        return
    except (KeyError, TypeError, AttributeError, IndexError):
        yield f"{kind}: not as FHIR R4 has it"
        return
    if not attachments:
        yield "content: no attachment"
    for number, attachment in enumerate(attachments):
        name = values["note_id"] + (f"#{number}" if number else "")
        try:
            yield values | {"note_id": name} | text_of(attachment)
        except ValueError as error:
            yield str(error)
        except (TypeError, AttributeError):
            yield f"{kind}: attachment: not as FHIR R4 has it"


def values_of(resource: Mapping[str, Any]) -> dict[str, Any]:
    """All but the text. Raises ValueError that says what is wrong, or another error where it is not as in FHIR."""
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
    kinds = [worded(one.get("display")) or worded(one.get("code")) for one in code.get("coding") or []]
    dates = [worded(resource.get(name)) for name in ("date", "effectiveDateTime", "issued")]
    return {
        "patient_id": patient_of(subject),
        "note_id": resource["id"],
        "date": next(filter(None, dates), ""),
        "note_type": worded(code.get("text")) or next(iter(kinds), ""),
        "encounter_id": tail(encounters[0]["reference"]) if encounters else "",
        "replaces": tuple(replaced),
    }


def tail(reference: str) -> str:
    """The id at the end of `Patient/7`, of one version of it, or of a whole address."""
    return unversioned(reference).rsplit("/", 1)[-1].removeprefix("urn:uuid:")


def unversioned(reference: str) -> str:
    """A reference without the version that it may name."""
    return reference.partition("/_history/")[0].rstrip("/")


def patient_of(reference: str) -> str:
    """The id of a patient. Raises ValueError if the reference names something else, or nothing."""
    kind = unversioned(reference).rpartition("/")[0].rpartition("/")[2]
    if kind not in ("", "Patient"):
        got = f"got a {kind}, " if re.fullmatch(r"[A-Z][A-Za-z]{1,39}", kind) else ""
        raise ValueError(f"subject.reference: {got}expected a Patient")
    if not (found := tail(reference)).strip():
        raise ValueError("subject.reference: missing")
    return found


def worded(value: Any) -> str:
    """A text, empty if there is none. Raises TypeError for anything else."""
    if not isinstance(value, str | None):
        raise TypeError("expected text")
    return value or ""


def attachments_of(resource: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The attachments of either kind of resource."""
    for one in resource.get("content") or []:
        yield one["attachment"]
    forms = resource.get("presentedForm") or []
    if not isinstance(forms, list):
        raise TypeError("expected a list")
    yield from forms


def text_of(attachment: Mapping[str, Any]) -> dict[str, Any]:
    """The text of an attachment. Raises ValueError where it cannot be read."""
    kind, _, rest = worded(attachment.get("contentType", "text/plain")).lower().partition(";")
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
    except (UnicodeError, LookupError) as error:
        raise ValueError(f"attachment.data: not {charset[1] if charset else 'utf-8'}") from error
    if kind == "text/plain":
        return {"text": text}
    shown, places = text_of_html(text)
    return {"text": shown, "raw_places": tuple(places)}


def text_of_html(html: str) -> tuple[str, list[tuple[int, int, int]]]:
    """The text without tags, and of each piece where it begins in the text and in the raw document, and where it ends
    there if it stands for something else (an entity, a tag that ends a line), or 0."""
    pieces: list[str] = []
    places: list[tuple[int, int, int]] = []
    length = at = 0

    def add(piece: str, raw: int, end: int = 0) -> None:
        nonlocal length
        if piece:
            places.append((length, raw, end))
            pieces.append(piece)
            length += len(piece)

    for start, end in marks(html):
        found = html[start:end]
        shown = unescape(found) if found.startswith("&") else "\n" if BREAK.match(found) else ""
        if shown != found:
            add(html[at:start], at)
            add(shown, start, end)
            at = end
    add(html[at:], at)
    return "".join(pieces), places


def marks(html: str) -> Iterator[tuple[int, int]]:
    """Start and end of each tag, entity and hidden piece. What is hidden without an end is not: it is text."""
    at = 0
    endless: set[str] = set()
    while (match := MARK.search(html, at)) is not None:
        end, name = match.end(), (match[1] or "").lower()
        if name:
            # Once no end follows, none does further on: each kind is looked for in vain once.
            hidden = None if name in endless else HIDDEN_TO[name].search(html, end)
            if hidden is None:
                endless.add(name)
            ended = hidden or TAG.match(html, match.start())
            if ended is None:
                at = end
                continue
            end = ended.end()
        yield match.start(), end
        at = end


def raw_place(
    places: list[tuple[int, int, int]] | tuple[tuple[int, int, int], ...], place: int, *, last: bool = False
) -> int:
    """Where a character of the text stands in the raw document; `last`: the place behind it, for an end."""
    if not places:
        return place
    wanted = place - 1 if last else place
    text, raw, end = places[max(0, bisect_right(places, (wanted, 1 << 62, 0)) - 1)]
    if end:
        return end if last else raw
    return raw + wanted - text + (1 if last else 0)
