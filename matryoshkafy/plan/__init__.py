"""What nests, decided once and frozen."""
