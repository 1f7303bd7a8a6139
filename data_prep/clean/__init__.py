"""Rules that a document must pass, each named, configurable and counted."""
