"""What `pipelines.extract` is made of: what is asked of it, what is done already, whose turn a shard is. No story of its own."""
