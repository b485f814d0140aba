"""Mine hard negatives: `torchrun --nproc-per-node 8 mine.py --model runs/ft/final --data data/train --output data/mined`.

Works alone too: `python mine.py ...` is one process. The same command continues a run that was
interrupted and skips finished tasks; other rules (a new --rank-range, say) encode nothing again.
Exit code 0 means that every task is written.
"""

import os
import sys

import torch

from kalm_min.config import parse
from kalm_min.mining.pipeline import Miner, MiningConfig
from kalm_min.training import distributed


def main(argv: list[str]) -> int:
    """Run; 0 when finished, 2 for what the user can mend, 130 when interrupted, 1 otherwise."""
    description = "Mine hard negatives and drop inconsistent rows, alone or under torchrun."
    config = parse(MiningConfig, argv, program="mine.py", description=description)
    environment = dict(os.environ)
    device = distributed.local_device(environment)
    if config.device is not None:
        device = torch.device(config.device)
    distributed.start(environment, device)
    try:
        return _mine(config, device)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was written is kept, the same command goes on\n")
        return 130
    except (ValueError, OSError) as error:
        kept = "; what was written is kept, the same command goes on"
        sys.stderr.write(f"mine.py: {error}{kept * isinstance(error, OSError)}\n")
        return 1 if isinstance(error, OSError) else 2
    finally:
        distributed.stop()


def _mine(config: MiningConfig, device: torch.device) -> int:
    """Wire the parts and run them."""
    miner = Miner(config, device, sys.stderr)
    if config.dry_run:
        plan = miner.plan()
        if distributed.rank() == 0:
            sys.stdout.write(plan + "\n")
        return 0
    total, remarks = miner.run()
    if distributed.rank() == 0:
        sys.stderr.write("".join(f"look at {remark}\n" for remark in remarks))
        sys.stderr.write(
            f"{total['rows']:,} rows = {total['kept']:,} kept + {total['outranked']:,} outranked + "
            f"{total['short']:,} with too few negatives; {total['negatives']:,} negatives; "
            f"report: {config.output / 'README.md'}\n"
        )
    return 0


if __name__ == "__main__":
    distributed.hard_exit(main(sys.argv[1:]))
