"""A package, so that ``tests.rig`` means this folder even where some installed distribution brings a ``tests`` of its own.

The folders below need no such file: pytest imports test modules by path (``--import-mode=importlib``).
"""
