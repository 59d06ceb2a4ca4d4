"""What `pipelines.verify` and `pipelines.repair` are made of: the verdict, views replayed, teachers run again, the plan of a repair. No story of its own."""
