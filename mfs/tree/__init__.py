"""What exists under which name: listings, inodes, times, and how one revision takes another's place. No bytes.

listing ← nodes ← namespace is the tree itself; refresh looks again, small_files and publication go with publishing,
record carries what directories showed over remounts.
"""
