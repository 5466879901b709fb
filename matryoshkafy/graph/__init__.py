"""A module and its example inputs become a graph in one vocabulary of ops."""
