"""A retriever whose documents are spread over others."""
