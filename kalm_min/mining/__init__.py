"""Hard negatives and ranking-consistency filtering: encode once to disk, then cheap passes.

texts (which there are) -> vectors -> top-k -> rules (status of rows, negatives) -> files and report
"""
