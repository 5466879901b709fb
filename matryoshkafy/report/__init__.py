"""One offline page on a model and its sizes."""
