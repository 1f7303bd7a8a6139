"""Images with a class each become a set of shards: `dnt data images`."""
