"""Score models: `python evaluate.py --help`; the same as `kalm-min evaluate`."""

from kalm_min.program import start

if __name__ == "__main__":
    start("evaluate")
