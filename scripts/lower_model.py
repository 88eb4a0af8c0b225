"""Write the integer engine's plan beside a model file: MODEL.safetensors -> MODEL.plan.safetensors.

python scripts/lower_model.py MODEL.safetensors
"""

from __future__ import annotations

import argparse

from cadyq.deploy import write_plan
from cadyq.io.shipped import model_path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    path = model_path(parser.parse_args().model)
    reason = write_plan(path)
    if reason:
        parser.exit(6, f"{path} has no plan: {reason}\n")
    print(f"the plan of {path} lies beside it")


if __name__ == "__main__":
    main()
