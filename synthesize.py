"""Write synthetic training data: `python synthesize.py --help`; the same as `kalm-min synthesize`."""

from kalm_min.program import start

if __name__ == "__main__":
    start("synthesize")
