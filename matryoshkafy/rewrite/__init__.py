"""Graph and plan become the graphs of dolls and sub-models."""
