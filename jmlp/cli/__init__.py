"""The `jmlp` command.

`main` parses, `commands` does, `flags` has each command's flags, `tables` prints.
"""
