"""What people see of a run: the live view, the tables, the picture and ``report.json``.

Nothing here trains or measures; it shows what others found. Tables and numbers load neither torch nor matplotlib.
"""
