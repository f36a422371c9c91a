"""What people see on a terminal: bars, tables, errors, help. Streams whose failure never changes how a command ends.

This room imports nothing of Fusion, so that all others can use it.
"""
