"""The reviser: says how much a reply has to be revised, and revises it."""

from typing import Literal, get_args

Label = Literal["no", "minor", "major"]
"""How much revision a reply needs."""
LABELS: tuple[Label, ...] = get_args(Label)
