"""Order and rotate: a pretrained model's units, most important first, its function the same."""
