"""The two stages and their companions, each a function that reads top to bottom: pack, extract, train, inspect, diff, verify, quickstart."""
