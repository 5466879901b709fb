"""Small random models of many other libraries (the extra `wide`): the world as the judge."""
