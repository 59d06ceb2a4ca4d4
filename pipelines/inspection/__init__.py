"""How what `pipelines.inspect` and `pipelines.diff` found is told at the terminal. No story of its own; the page is in `pipelines.page`."""
