"""The arithmetic of nested layers, fast: custom operators and the plain forms they are tested by."""
