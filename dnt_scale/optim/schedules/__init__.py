"""One file a schedule, `optim.schedule.name`: being in this folder is all it takes to be known.

docs/extend/schedule.md shows how to write one.
"""
