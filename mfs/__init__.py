__version__ = "0.1.0"
"""Asked of the installed package it would cost each start 10 ms: its description is read as a letter."""
