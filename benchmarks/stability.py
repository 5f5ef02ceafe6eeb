"""Each family in bfloat16 under its whole recipe, on the digits: does a run stay finite?

    python benchmarks/stability.py [STEPS]

A run that does not ends with `NonFiniteError`. Prints the first and the last loss of each family.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from configs import quickstart, recipes
from vitpyramid.tasks import make_task
from vitpyramid.train import loop


def run(family: str, steps: int) -> tuple[float, float]:
    config = quickstart.get_config(family)
    recipes.augmentation(config)
    config.update_from_flattened_dict(
        {
            "epochs": steps / 22,
            "model.dtype": "bfloat16",
            "model.drop_path_rate": 0.1,
            "data.repeats": 3,
            "mix.before_normalise": family == "t2t_vit",
            "schedule.warmup_epochs": 0.5,
            "schedule.cooldown_epochs": 0.0,
            "ema.decay": 0.99,
            "log.every_steps": 10,
        }
    )
    with tempfile.TemporaryDirectory() as workdir:
        loop.train(make_task(config), Path(workdir))
        lines = map(json.loads, (Path(workdir) / "metrics.jsonl").read_text().splitlines())
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
    return losses[0], losses[-1]


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 110
    for name in ("pvt", "pit", "t2t_vit", "rest"):
        print(f"{name}: loss {{:.3f}} -> {{:.3f}} in {steps} steps".format(*run(name, steps)), flush=True)
