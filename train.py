"""Train an embedding model: `python train.py --help`; the same as `kalm-min train`."""

from kalm_min.program import start

if __name__ == "__main__":
    start("train")
