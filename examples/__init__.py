"""Worked examples: each is a package of its own that uses matryoshkafy from outside."""
