"""`dnt report`: what runs led to, in curves, against a setting, and in tables."""
