"""What `pipelines.verify` is made of: the verdict, views replayed, teachers run again. No story of its own."""
