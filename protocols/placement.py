"""What an actor takes of a machine."""

from pydantic import Field

from protocols.service import Message


class Resources(Message):
    """Ray resources of one replica, and how many replicas there are."""

    cpus: float = Field(default=0.0, ge=0)
    """CPU cores that the scheduler sets aside per replica."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs per replica; fractions share one."""
    replicas: int = Field(default=1, ge=1)
    """Copies behind one handle; each call goes to the least loaded."""
