"""Mine hard negatives: `python mine.py --help`; the same as `kalm-min mine`."""

from kalm_min.program import start

if __name__ == "__main__":
    start("mine")
