"""Engines: how a model is spread over devices and stepped. ``base.py`` holds the protocol."""
