"""The reward model: scores of replies, and of their tokens."""
