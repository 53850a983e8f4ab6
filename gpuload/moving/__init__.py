"""Bytes on their way: which ones, in which order, from where, through what. No torch, no server, no sockets of ours.

plan, moves (pure) → pipeline, which takes bytes from a source (a file, or a mount's RAM) through the staging ring
into a device.
"""
