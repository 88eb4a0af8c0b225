"""Write the integer engine's plan beside a model file: MODEL.safetensors -> MODEL.plan.safetensors.

python scripts/lower_model.py MODEL.safetensors
"""

from __future__ import annotations

import argparse

from cadyq.backbones import build_backbone
from cadyq.io.models import load_model
from cadyq.io.plans import save_plan
from cadyq.io.shipped import MODEL_SUFFIX, PLAN_SUFFIX, model_path
from cadyq.lowering import lower


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    path = model_path(parser.parse_args().model)
    loaded = load_model(path)
    network = loaded.network
    assert loaded.quantization is not None, "a float network has no integer form"
    plan = lower(network, loaded.quantization)
    target = path.with_name(path.name.removesuffix(MODEL_SUFFIX) + PLAN_SUFFIX)
    save_plan(
        target,
        plan,
        loaded.metadata,
        parameters=build_backbone(network.name, **network.config).n_parameters(),
        radius=network.radius,
        exit_rule=loaded.exit_rule,
    )
    print(f"{target}: {target.stat().st_size} bytes, {len(plan.steps)} steps, {len(plan.sites)} sites")


if __name__ == "__main__":
    main()
