"""What a trained run is for: small models, tables of items, recommendations, a service."""
