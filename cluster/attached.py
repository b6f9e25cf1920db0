"""The actors of another run in the same Ray cluster."""

from cluster.ray_transport import find
from cluster.replicas import Replicas
from protocols.codegen import services
from protocols.handle import Transport, make_handle
from protocols.service import Service


async def attached(run: str, deadline_s: float) -> dict[str, Service]:
    """Handles to the actors of a run, by name. Raises BadInput when it has none."""
    published = {service.__name__: service for service in services()}
    behind: dict[tuple[str, str], list[Transport]] = {}
    for transport, part in await find(run, deadline_s):
        behind.setdefault((part.handle, part.service), []).append(transport)
    handles = {}
    for (name, service), transports in behind.items():
        # Samplers, ranks and shards are the business of those that they work for.
        if service in published:
            reached = transports[0] if len(transports) == 1 else Replicas(name, transports)
            handles[name] = make_handle(published[service], reached, deadline_s)
    return handles
