"""The page of a report: what it shows, its sections, and the template that they fill."""
