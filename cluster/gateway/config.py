"""How a gateway listens, whom it lets in, and how much it takes at once."""

import ipaddress
from typing import Self

from pydantic import Field, model_validator

from protocols.service import Message

LAST_WORDS = 1.0
"""Seconds for answers that are on their way to callers when a gateway stops."""


class TLSConfig(Message):
    """The gateway's certificate; with `client_ca` callers must have one too (mutual TLS)."""

    certificate: str
    """File of the certificate chain, PEM."""
    key: str
    """File of its key, PEM."""
    client_ca: str = ""
    """File of the authority that signed the callers' certificates, PEM; empty: they need none."""


class GatewayConfig(Message):
    """A gateway."""

    address: str = "127.0.0.1:50051"
    """HOST:PORT to listen at; port 0 takes a free one."""
    http: str = ""
    """HOST:PORT of a second door that speaks OpenAI's HTTP API; empty: none."""
    tls: TLSConfig | None = None
    """Certificate; null: no encryption, on loopback alone unless `plaintext_beyond_loopback`."""
    plaintext_beyond_loopback: bool = False
    """Listen without TLS where other machines reach it, for a network that is encrypted by other means."""
    tokens: str = ""
    """File of the callers' tokens (`launch.py token`); empty: every caller may do everything, on loopback, or with a
    certificate of `tls.client_ca`."""
    max_message_mb: int = Field(default=64, ge=1, le=2047)
    """Longest request, in MB."""
    tokens_at_once: int = Field(default=1_000_000, ge=1)
    """Estimated tokens of the requests that run at the same time; more wait. One that may draw more than its share is
    refused, one that is longer runs alone."""
    train_share: float = Field(default=0.25, ge=0, lt=1)
    """Share of `tokens_at_once` that is kept for calls that train."""
    queue: int = Field(default=1024, ge=0)
    """Requests that may wait, half of them of one caller; more are refused with RESOURCE_EXHAUSTED."""
    stall_s: float = Field(default=60.0, gt=0)
    """Seconds that a stream waits for a caller that does not read."""
    drain_s: float = Field(default=60.0, ge=0)
    """Seconds that calls under way have to finish when the gateway stops."""
    metrics: str = ""
    """HOST:PORT where Prometheus reads the gateway's counters over HTTP; empty: nowhere."""
    log_prompts: bool = False
    """Write requests into the log, prompts included."""

    @property
    def most_open(self) -> int:
        """Calls that may be open at a door, those that wait among them; more are refused at once."""
        return 2 * self.queue + 4096

    @model_validator(mode="after")
    def _closed_to_others(self) -> Self:
        doors = {"address": self.address} | ({"http": self.http} if self.http else {})
        hosts = {name: host_and_port(name, address)[0] for name, address in doors.items()}
        if self.metrics:
            host_and_port("metrics", self.metrics)
        open_ = [(name, host) for name, host in hosts.items() if not is_loopback(host)]
        if not open_:
            return self
        name, host = open_[0]
        if self.tls is None and not self.plaintext_beyond_loopback:
            raise ValueError(
                f"{name}: {host} is reached from other machines; set tls, or plaintext_beyond_loopback=true"
            )
        if not self.tokens and not (self.tls and self.tls.client_ca):
            raise ValueError(f"{name}: {host} is reached from other machines; set tokens, or tls.client_ca")
        return self


def host_and_port(name: str, address: str) -> tuple[str, int]:
    """Both parts of HOST:PORT. Raises ValueError that names the key."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{name}: got {address!r}, expected HOST:PORT")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host's address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
