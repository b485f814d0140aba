"""Scores of a model on mteb's benchmarks and on one's own datasets.

    plan -> runner -> one worker process per device -> a result file per task -> report

The parent (`plan`, `runner`, `report`) never touches a device; a worker (`worker`, `encoder`) may
die without taking anything but its own task along. Every score is mteb's; none is computed here.
"""
