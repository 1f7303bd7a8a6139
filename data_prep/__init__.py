"""Text in, checksummed WebDataset token shards out. No torch here."""
