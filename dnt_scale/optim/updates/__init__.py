"""One file an update rule, `groups.NAME.update`: being in this folder is all it takes to be known.

docs/extend/optimizer.md shows how to write one. A file here imports torch inside of functions only,
for configurations are read without it (tests/test_rooms.py).
"""
