"""Access patterns to decisions: what will be wanted next. Asks the cache, never fetches by itself.

pattern.py  what one object's reads say about the next ones; pure
engine.py   turns that into orders to the cache, within budgets
"""
