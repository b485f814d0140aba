"""Scores of a model on mteb's benchmarks and on local datasets.

    plan -> runner -> one worker process per device -> one result file per task -> report

The parent (`plan`, `local`, `runner`, `report`) never uses a device; a worker (`worker`, `adapter`)
that dies loses only its current task. Every score is computed by mteb.
"""
