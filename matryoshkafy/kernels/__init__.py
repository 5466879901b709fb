"""The arithmetic of nested layers, fast: operators, and the plain forms that test them."""
