"""The two stages and their companions, each a function that reads top to bottom: pack, extract, train, sweep, inspect, diff, verify, repair, copy,
gc, quickstart. What one is made of lies in a folder beside it; `facts` and `words` are shared by all that show a cache."""
