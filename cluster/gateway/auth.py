"""Who calls, and what they may do: bearer tokens from a file that holds their hashes."""

import hashlib
import hmac
import logging
import secrets
from pathlib import Path

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from protocols.errors import BadInput, Denied, Unauthenticated, classify
from protocols.service import Message, Role

logger = logging.getLogger("repertory.gateway")


class Caller(Message):
    """One entry of the file of tokens."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """How the log calls it."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of its token, in hexadecimal."""
    roles: list[Role]
    """What it may do: `infer` asks, `train` changes what actors know, `admin` stops them."""
    requests_per_second: float = Field(default=0.0, ge=0)
    """Calls that it may begin per second, on average; 0: any number."""
    concurrent: int = Field(default=0, ge=0)
    """Calls that it may have under way; 0: any number."""


ANYONE = Caller(name="anyone", sha256="0" * 64, roles=["infer", "train", "admin"])
"""Every caller of a gateway without a file of tokens."""
_FILE = TypeAdapter(list[Caller])


class Callers:
    """The callers that a file names; read again when it changes."""

    def __init__(self, file: str) -> None:
        """Raises BadInput when the file is missing or not a list of callers."""
        self._file = Path(file) if file else None
        self._changed: tuple[int, int] | None = None
        self._known: list[Caller] = []
        if self._file:
            self._changed = self._stamp()
            self._known = read(self._file)

    def of(self, authorization: str) -> Caller:
        """The caller with this `authorization` header. Raises Unauthenticated."""
        if self._file is None:
            return ANYONE
        self._refresh(self._file)
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("authorization: expected `Bearer TOKEN`")
        shown = hash_of(token)
        found = None
        for caller in self._known:  # all of them, so that the time says nothing
            if hmac.compare_digest(caller.sha256, shown):
                found = caller
        if found is None:
            raise Unauthenticated("authorization: the token is not known")
        return found

    def _refresh(self, file: Path) -> None:
        stamp = self._stamp()
        if stamp == self._changed:
            return
        self._changed = stamp
        try:
            found = read(file)
            if self._known and not found:
                raise BadInput(f"tokens: {file} names nobody")
            self._known = found
            logger.info("read %d callers from %s", len(self._known), file)
        except BadInput as error:
            # A file that is being written must lock nobody out.
            logger.error("kept the callers that were known: %s", error)

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = self._file.stat() if self._file else None
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_size) if found else None


def check_role(caller: Caller, method: str, role: Role) -> None:
    """Raise Denied unless the caller may make a call that needs the role."""
    if role not in caller.roles:
        raise Denied(f"{caller.name} may not call {method}: it needs the role {role}")


def read(file: Path) -> list[Caller]:
    """The callers in a YAML file. Raises BadInput that names the file and the field."""
    try:
        found = _FILE.validate_python(yaml.safe_load(file.read_text("utf-8")) or [])
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"tokens: cannot read {file}: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise BadInput(f"tokens: {file}: {classify(error)}") from error
    for names in ([one.name for one in found], [one.sha256 for one in found]):
        if len(set(names)) < len(names):
            raise BadInput(f"tokens: {file}: two callers have the same name or token")
    return found


def new_token(name: str, roles: list[Role]) -> tuple[str, str]:
    """A new token, and the entry that makes it known, as YAML. Raises BadInput for a bad name or role."""
    token = secrets.token_urlsafe(32)
    try:
        caller = Caller(name=name, sha256=hash_of(token), roles=roles)
    except ValidationError as error:
        raise classify(error) from error
    entry = caller.model_dump(include={"name", "sha256", "roles"})
    return token, yaml.safe_dump([entry], sort_keys=False)


def hash_of(token: str) -> str:
    """SHA-256; tokens are random and long, so nothing slower is needed."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
