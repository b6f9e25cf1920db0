"""What stands behind a router actor: something that scores candidates, learns, and can be written down."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from actors.router.backbone import Backbone, encoder_source, outline_size, text_of
from protocols.errors import BadInput, Corrupt
from protocols.router import FROM_MEMORY, Candidate, Kind, RouterConfig, RouteRow, RouteTrainResponse
from protocols.service import Message

ABOUT = "router.json"
ENCODER = "encoder"
STATE = {"version", "kept", "fresh"}
"""Fields of About that are no configuration."""


class About(Message):
    """What a folder with a router holds."""

    kind: Kind
    """How it decides."""
    model: str
    """Encoder that it began with; the folder has the encoder as it is now, where there is one."""
    candidates: list[Candidate]
    """The pool, in the order of scores."""
    response_tokens: int
    """Of lookahead: tokens of an answer that are predicted."""
    blocks: str
    """Of masked lookahead: joint or apart."""
    hidden: int
    """Of mlp and matrix: width."""
    temperature: float
    """Of router_dc: divides similarities."""
    neighbours: int
    """Of knn and kmeans."""
    max_tokens: int
    """Longest query."""
    seed: int
    """Of random and kmeans."""
    version: int
    """Weight version, or rows that are remembered."""
    kept: list[str] | None = None
    """Candidates that were not to change, where only new ones were trained."""
    fresh: list[str] = []
    """Weights of the encoder that did not come with it."""


@dataclass(frozen=True)
class Scored:
    """Scores of B queries."""

    scores_BT: NDArray[np.float64]
    """From 0 to 1, higher is better."""
    cut_B: list[bool]
    """Whether a query was too long."""


class Chooser(ABC):
    """Scores the candidates of a pool for queries."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.version = 0
        self.backbone: Backbone | None = None

    @property
    def names(self) -> list[str]:
        """The pool, in the order of scores."""
        return [one.name for one in self.config.candidates]

    @property
    def limit(self) -> int:
        """Longest query in tokens."""
        most = self.config.max_tokens
        if self.backbone is None:
            return most
        most = min(most, self.backbone.context)
        if self.config.kind != "lookahead":
            return most
        # The query leaves room for the answers' places, as the reference code does.
        return most - (self.config.response_tokens + 1 if self.backbone.masked else 10)

    @property
    def kept(self) -> list[str] | None:
        """Candidates that training does not change, where only new ones learn."""
        return None

    @abstractmethod
    def score(self, texts: Sequence[str]) -> Scored:
        """Scores of each candidate for each query."""

    @abstractmethod
    def learn(self, rows: Sequence[RouteRow]) -> RouteTrainResponse:
        """Learn from rows whose scores have been checked."""

    @abstractmethod
    def counts(self) -> tuple[int, int]:
        """Number of weights, and of those that a step changes."""

    @abstractmethod
    def _write(self, folder: Path, training_state: bool) -> None:
        """Write what this chooser has learnt into a folder that exists."""

    @abstractmethod
    def read(self, folder: Path, about: About, training_state: bool) -> None:
        """Take over what another chooser of this kind has written; candidates are matched by name."""

    def write(self, folder: Path, training_state: bool) -> None:
        """Write everything that `open_chooser` needs."""
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder, training_state)
        if self.backbone is not None:
            self.backbone.model.save_pretrained(folder / ENCODER)
            self.backbone.tokenizer.save_pretrained(folder / ENCODER)
        fresh = sorted(self.backbone.fresh) if self.backbone else []
        given = {name: getattr(self.config, name) for name in About.model_fields if name not in STATE}
        (folder / ABOUT).write_text(
            About(**given, version=self.version, kept=self.kept, fresh=fresh).model_dump_json(indent=1)
        )


def read_about(folder: Path) -> About:
    """What a folder holds. Raises BadInput when it is no router's, Corrupt when it is damaged."""
    file = folder / ABOUT
    if not file.is_file():
        raise BadInput(f"router: {folder} holds no router (no {ABOUT})")
    try:
        return About.model_validate_json(file.read_text())
    except (OSError, ValidationError) as error:
        raise Corrupt(f"{file} does not describe a router: {error}") from error


def open_chooser(config: RouterConfig) -> Chooser:
    """The chooser of a configuration, with what `trained` has learnt. Raises BadInput when they do not fit."""
    about = read_about(Path(config.trained).expanduser()) if config.trained else None
    if about is not None:
        config = _continued(config, about)
    if len(config.candidates) < 2:
        raise BadInput(f"candidates: got {len(config.candidates)}, expected at least two models to choose from")
    chooser = _new(config, about)
    if about is not None:
        chooser.read(Path(config.trained).expanduser(), about, False)
    return chooser


def reopened(config: RouterConfig, folder: Path, training_state: bool) -> Chooser:
    """The chooser that a folder holds, whatever its kind and pool; of `config` only where it computes and learns."""
    about = read_about(folder)
    given = about.model_dump(exclude=STATE)
    chooser = _new(RouterConfig.model_validate(config.model_dump() | given | {"trained": str(folder)}), about)
    chooser.read(folder, about, training_state)
    chooser.version = about.version
    return chooser


def _continued(config: RouterConfig, about: About) -> RouterConfig:
    """A configuration that takes from the folder its shape, and its pool if it names none.

    Raises BadInput for a shape that was given and is another one.
    """
    shape = {name: getattr(about, name) for name in ("kind", "response_tokens", "blocks", "hidden")}
    for name, saved in shape.items():
        given = getattr(config, name)
        if name in config.model_fields_set and given != saved:
            raise BadInput(f"{name}: got {given!r}, expected {saved!r}, which the router at {config.trained} has")
    left_open = {"temperature", "neighbours", "max_tokens", "seed"} - config.model_fields_set
    taken = shape | {name: getattr(about, name) for name in left_open}
    return config.model_copy(update=taken | {"candidates": config.candidates or about.candidates})


def _new(config: RouterConfig, about: About | None) -> Chooser:
    from actors.router.learnt import LearntChooser
    from actors.router.memory import MemoryChooser

    folder = Path(config.trained).expanduser() / ENCODER if about is not None else None
    if config.kind in FROM_MEMORY:
        return MemoryChooser(config, folder)
    return LearntChooser(config, folder, about.fresh if about is not None else None)


def encoder_size(config: RouterConfig) -> int:
    """Number of an encoder's weights, without loading them; 0 for kinds that have none. Raises BadInput."""
    folder = Path(config.trained).expanduser() if config.trained else None
    kind = read_about(folder).kind if folder else config.kind
    if kind in ("best", "random"):
        return 0
    return outline_size(str(folder / ENCODER) if folder else encoder_source(config.model))


def texts_of(rows: Sequence[RouteRow]) -> list[str]:
    """The queries of rows."""
    return [text_of(row.prompt) for row in rows]


def matched(names: Sequence[str], known: Sequence[str]) -> list[tuple[int, int]]:
    """Places of the candidates that both pools have: (here, there)."""
    return [(i, known.index(name)) for i, name in enumerate(names) if name in known]
