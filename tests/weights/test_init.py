import subprocess
import sys

import lightning_soup.weights

HEAVY = {"lightning", "timm", "torchvision", "open_clip", "wandb", "matplotlib", "pandas", "scipy", "sklearn", "rich"}


def test_the_public_names():
    names = {name for name in vars(lightning_soup.weights) if not name.startswith("_")}
    public = {"WeightsFile", "check_compatible", "combine", "open_checkpoint", "save_weights"}
    modules = {name for name in names if f"lightning_soup.weights.{name}" in sys.modules}
    assert names - modules | {"combine"} == public


def test_averaging_files_does_not_pay_for_a_trainer(tmp_path):
    script = f"""
import sys, torch
from lightning_soup.weights import combine, save_weights
save_weights({{"w": torch.ones(2)}}, r"{tmp_path}/a.ckpt")
combine([r"{tmp_path}/a.ckpt"] * 2, [0.5, 0.5], r"{tmp_path}/b.safetensors")
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(ran.stdout.split()) & HEAVY == set()
