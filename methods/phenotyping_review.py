"""The review page: one file in which a clinician sees decisions with their snippets, and says what is right."""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from cluster.run_directory import write_atomically
from methods.phenotyping_decide import Decided
from methods.phenotyping_definition import Definition

TEMPLATE = Path(__file__).with_name("phenotyping_review.html.jinja")


def write_review(file: Path, found: Iterator[Decided], definitions: Sequence[Definition], most: int) -> int:
    """Write the page with the first `most` decisions that are not a plain no; returns how many there are on it.

    Texts go into it as data and are only ever shown as text.
    """
    import jinja2

    rows = list(islice((one for one in found if one.decision not in ("no", "no_evidence")), most))
    names = {one.phenotype_id: {"name": one.name, "description": one.description} for one in definitions}
    told = {"rows": [one.model_dump(mode="json") for one in rows], "definitions": names}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    # A closing tag in a text must not end the data.
    data = json.dumps(told, ensure_ascii=True).replace("<", "\\u003c")
    write_atomically(file, page.render(data=data))
    return len(rows)
