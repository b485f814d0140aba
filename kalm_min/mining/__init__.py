"""Hard negatives and ranking-consistency filtering: encode once to disk, then cheap passes.

catalogue (which texts) -> store (their vectors) -> search (neighbours) -> negatives (rules)
     -> the task's file, record and report
"""
