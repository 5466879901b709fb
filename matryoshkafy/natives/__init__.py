"""Native sizes: a slice as the user's own class at a smaller configuration."""
