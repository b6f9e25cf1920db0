"""Where documents, questions and truth come from: generated worlds and folders of real text."""
