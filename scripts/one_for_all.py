"""Does one network at different budgets keep up with networks that were trained for one mean of bits each?

    python scripts/one_for_all.py ONE TRAINED [TRAINED ...] [--cache FOLDER] [--json FILE]

Every TRAINED network is measured as it is; ONE then gets the budget at which it uses as many bits (bisection), and both
PSNRs are compared. Validation crops, PSNR per photo (`content_decides.py`); all networks need their plans beside them.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from content_decides import Runner, photos, psnr_per_photo
from numpy.typing import NDArray

from cadyq.functional.fidelity import paired_bootstrap
from cadyq.training.budget import find_budget


def measured(run: Runner, budget: float, photo: list[int]) -> tuple[NDArray[np.float64], float]:
    """PSNR per photo, and mean bits, at a budget."""
    run.budget = budget
    errors, tables = run(None)
    return psnr_per_photo(errors, photo), float(np.mean([t.mean() for t in tables]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("one")
    parser.add_argument("trained", nargs="+")
    parser.add_argument("--cache", default="runs/cache")
    parser.add_argument("--json")
    options = parser.parse_args()
    one = Runner(options.one, options.cache, None, 0.0)
    photo = photos()
    rows: list[dict[str, Any]] = []
    for name in options.trained:
        theirs, fqr = measured(Runner(name, options.cache, None, 0.0), 0.0, photo)
        budget, _ = find_budget(lambda b: measured(one, b, photo)[1], fqr)
        ours, found = measured(one, budget, photo)
        mean, low, high = paired_bootstrap(ours, theirs)
        rows.append(
            {
                "trained": name,
                "fqr_trained": fqr,
                "psnr_trained_db": float(theirs.mean()),
                "budget": budget,
                "fqr": found,
                "psnr_db": float(ours.mean()),
                "difference_db": [mean, low, high],
            }
        )
        print(
            f"{Path(name).stem}: FQR {fqr:.3f}, {theirs.mean():.3f} dB; {Path(options.one).stem} "
            f"at budget {budget:.4f}: FQR {found:.3f}, {ours.mean():.3f} dB, {mean:+.3f} ({low:+.3f} to {high:+.3f})",
            flush=True,
        )
    order = sorted(rows, key=lambda row: row["fqr"])
    rising = all(a["psnr_db"] < b["psnr_db"] for a, b in pairwise(order))
    print("PSNR rises with the bits" if rising else "PSNR does not rise with the bits")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
