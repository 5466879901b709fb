"""Small random models of public libraries, each with inputs and mostly a truth."""
