"""Mine hard negatives: `torchrun --nproc-per-node 8 mine.py --model runs/ft/final --data data/train --output data/mined`.

`python mine.py ...` runs as a single process. The same command continues an interrupted run and
skips finished tasks; other rules (a new --rank-range, for example) encode nothing again. The exit
code is 0 if every task is written.
"""

import os
import sys

from kalm_min import program
from kalm_min.config import check_output, run
from kalm_min.console import printable
from kalm_min.options import MiningConfig


def main(argv: list[str]) -> int:
    """Run and return the exit code; see `config.run`."""
    loads = "kalm_min.mining.pipeline"
    return run(MiningConfig, mine, argv, program="mine.py", loads=loads, resumable=True)


def mine(config: MiningConfig) -> int:
    """Mine, or print what would be done."""
    from kalm_min.embedder import pick_device
    from kalm_min.mining import report
    from kalm_min.mining.pipeline import Miner
    from kalm_min.training import distributed

    inputs = (config.model, config.data, config.pool, config.scorer)
    check_output(config.output, *inputs, marks=[".mining"])
    environment = dict(os.environ)
    device = pick_device(config.device or distributed.local_device(environment))
    distributed.start(environment, device)
    try:
        miner, output = Miner(config, device, sys.stderr), sys.stdout
        if config.dry_run:
            text = miner.plan()
        else:
            with distributed.locked(config.output):
                total, remarks = miner.run()
            output, lines = sys.stderr, [f"look at {printable(remark)}" for remark in remarks]
            sums = f"{report.sentence(total)}; {total['negatives']:,} negatives"
            text = "\n".join([*lines, f"{sums}; report: {config.output}/README.md"])
        if distributed.rank() == 0:
            output.write(text + "\n")
        return 0
    finally:
        distributed.stop()


if __name__ == "__main__":
    program.start("mine")
