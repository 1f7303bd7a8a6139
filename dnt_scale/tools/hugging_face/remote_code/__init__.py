"""What `dnt export` copies beside a model that transformers does not know; nothing here imports it,
and it imports torch, transformers and sentencepiece alone.
"""
