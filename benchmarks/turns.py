"""Process that runs a pass of a merged model whenever it is asked, for two versions of tokenmerge that take turns.

`overhead.py --against COMMIT` starts it twice, with this tree and with the tree of that commit on PYTHONPATH. For each line that it
reads, it prints the seconds of one forward pass.
"""

from __future__ import annotations

import sys
import time

import timm
import torch

import tokenmerge


def main() -> None:
    """Run `turns.py NAME SIZE R BATCH DTYPE`."""
    name, size, r, batch = sys.argv[1], *(int(word) for word in sys.argv[2:5])
    dtype = getattr(torch, sys.argv[5])
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size).eval().to(dtype)
    tokenmerge.patch(model, r=r)
    images = torch.randn(batch, 3, size, size).to(dtype)
    print(tokenmerge.__file__, flush=True)
    with torch.inference_mode():
        for _ in sys.stdin:
            start = time.perf_counter()
            model(images)
            print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
