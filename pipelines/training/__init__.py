"""What `pipelines.train` is made of: what is asked, what is trained on, a student's run, and the gang that feeds it. No story of its own."""
