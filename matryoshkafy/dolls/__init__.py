"""The verbs on models: convert, outputs, slice, verify."""
