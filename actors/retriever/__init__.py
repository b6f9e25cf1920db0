"""Keeps documents, finds them by words or meaning, and cuts snippets around patterns."""
