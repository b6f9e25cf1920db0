"""The policy: one language model that samples, scores and learns."""
