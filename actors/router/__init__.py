"""The router and what may stand behind it."""
