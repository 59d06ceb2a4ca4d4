"""The command line: one command a file, thin; each parses, calls one function of `pipelines`, prints."""
