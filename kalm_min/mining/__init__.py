"""Hard negatives and ranking-consistency filtering: encode once to disk, then cheap passes.

texts (of each task) -> vectors -> top-k -> rules (status of rows, negatives) -> files and report
"""
