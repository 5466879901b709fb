"""Checkpoints: folders written whole or not at all, no pickle."""
