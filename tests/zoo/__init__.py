"""Small random models of public libraries, each with example inputs and, where possible, a truth."""
