"""Parts of `compare_tables.py`.

`sets.py` reads the data sets and splits them, `methods.py` has what is compared,
`cell.py` measures one method on one split, in a process of its own, `report.py`
makes the tables.
"""
