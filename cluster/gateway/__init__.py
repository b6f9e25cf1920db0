"""The gateway: actors of this cluster for services outside of it."""
