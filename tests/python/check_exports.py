"""Proves that diffusers loads what we export, and draws the same picture with it as our engine.

    DISTILLERY_KEEP_EXPORT=/tmp/kept cargo test --release -p distillery-engine --test finish
    python tests/python/check_exports.py worker/engine/tests/fixtures/sd15 /tmp/kept --engine target/release/engine

Needs torch, diffusers, transformers, peft, numpy and pillow; no network. Exit status 1 when anything differs.
"""

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models import AutoencoderKL
from diffusers.schedulers import scheduling_lcm
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors import safe_open

EVALUATION_NOISE, RENOISE = 4, 5
PROMPT = "two red discs left of a blue ring"


def philox(counter, key):
    """Ten rounds of Philox4x32 (Salmon et al., SC 2011)."""
    mask = 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(b >> 32) ^ counter[1] ^ key[0], b & mask, (a >> 32) ^ counter[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter


def normal(seed, purpose, ordinal, draw, shape):
    """Standard normal numbers of the stream (seed, purpose, ordinal, draw), as the engine draws them."""
    count = math.prod(shape)
    words, block = [], 0
    while len(words) < 2 * ((count + 1) // 2):
        state = [block, purpose << 16 | draw, ordinal & 0xFFFFFFFF, ordinal >> 32]
        words += philox(state, [seed & 0xFFFFFFFF, seed >> 32])
        block += 1
    units = [(word + 0.5) * 2.0**-32 for word in words]
    values = []
    for u, v in zip(units[0::2], units[1::2]):
        radius = math.sqrt(-2 * math.log(u))
        values += [radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)]
    return torch.tensor(values[:count], dtype=torch.float64).float().view(1, *shape)


class Warnings(logging.Handler):
    """Keeps what diffusers complains about."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def check(what, well, found=""):
    print(f"{'ok  ' if well else 'FAIL'}  {what} {found}")
    if not well:
        check.failed += 1


check.failed = 0


def check_loading(pipeline):
    for name, cls in [("unet", UNet2DConditionModel), ("vae", AutoencoderKL)]:
        _, info = cls.from_pretrained(pipeline / name, output_loading_info=True)
        odd = {key: sorted(value) for key, value in info.items() if value}
        check(f"{name}: no missing, unexpected or mismatched key", not odd, odd or "")


def check_lora(teacher, pipeline, file):
    """The LoRA file on the teacher computes as the exported denoiser."""
    with safe_open(file, "pt") as tensors:
        modules = {key.split(".")[0] for key in tensors.keys()}
    heard = Warnings()
    logger = logging.getLogger("diffusers")
    logger.addHandler(heard)
    pipe = DiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32, safety_checker=None)
    pipe.load_lora_weights(file.parent, weight_name=file.name, local_files_only=True)
    logger.removeHandler(heard)
    # The file is for the denoiser alone; that it has nothing for the text encoder is as it should be.
    expected = "No LoRA keys associated to CLIPText"
    complaints = [text for text in heard.said if "key" in text.lower() and not text.startswith(expected)]
    check("lora: no missing or unexpected key", not complaints, complaints or "")
    loaded = {name for name, _ in pipe.unet.named_modules() if ".lora_A." in name}
    check("lora: every module of the file is in use", len(loaded) == len(modules), f"{len(loaded)} of {len(modules)}")
    exported = UNet2DConditionModel.from_pretrained(pipeline / "unet", torch_dtype=torch.float32)
    z, t, texts = question(pipe)
    with torch.no_grad():
        a = pipe.unet(z, t, encoder_hidden_states=texts).sample
        b = exported(z, t, encoder_hidden_states=texts).sample
    difference = ((a - b).abs().max() / b.abs().max()).item()
    check("lora on the teacher = exported denoiser", difference <= 1e-3, f"(relative difference {difference:.1e})")
    pipe.unload_lora_weights()
    with torch.no_grad():
        plain = pipe.unet(z, t, encoder_hidden_states=texts).sample
    moved = ((plain - b).abs().max() / b.abs().max()).item()
    check("the student is not its teacher", moved > 10 * difference, f"(relative difference {moved:.1e})")


def question(pipe):
    config = pipe.unet.config
    z = normal(3, EVALUATION_NOISE, 0, 0, (config.in_channels, config.sample_size, config.sample_size))
    texts, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
    return z, torch.tensor([499]), texts


def draw(pipeline, steps, seed):
    """A picture by diffusers, its noise ours."""
    pipe = DiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.float32)
    config = pipe.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    draws = iter(range(steps))
    scheduling_lcm.randn_tensor = lambda *_, **__: normal(seed, RENOISE, 0, next(draws), shape)
    images = pipe(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=1.0,
        latents=normal(seed, EVALUATION_NOISE, 0, 0, shape),
        output_type="np",
    ).images
    print(f"      times of {steps} steps: {pipe.scheduler.timesteps.tolist()}")
    return np.round(images[0] * 255).astype(int)


def check_pictures(engine, pipeline):
    seed = 5
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "request": "sample",
            "model": {"folder": str(pipeline)},
            "prompts": [PROMPT],
            "steps": [1, 2, 4, 8],
            "sampler": "lcm",
            "seeds": [seed],
            "guidance": None,
            "out": folder,
            "grid": None,
            "dtype": "f32",
            "host": {"device": "cpu", "threads": 1},
        }
        answer = subprocess.run([engine, "once"], input=json.dumps(request).encode(), stdout=subprocess.PIPE)
        check("the engine draws", answer.returncode == 0, answer.stdout.decode()[-300:] if answer.returncode else "")
        for steps in request["steps"]:
            ours = np.asarray(Image.open(Path(folder) / f"0000-seed{seed}-steps{steps}.png")).astype(int)
            theirs = draw(pipeline, steps, seed)
            difference = np.abs(ours - theirs).max()
            # Two ways to round half of a byte may differ by one.
            check(f"{steps} steps: the same picture", difference <= 1, f"(largest difference {difference} of 255)")


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("teacher", type=Path)
    arguments.add_argument("export", type=Path, help="folder with diffusers/ and *-lora.safetensors")
    arguments.add_argument("--engine", type=Path, required=True)
    given = arguments.parse_args()
    diffusers_logging.set_verbosity_warning()
    pipeline = given.export / "diffusers"
    check_loading(pipeline)
    for file in sorted(given.export.glob("*-lora.safetensors")):
        check_lora(given.teacher, pipeline, file)
    check_pictures(given.engine.resolve(), pipeline)
    print(f"check_exports: {check.failed} failed")
    sys.exit(1 if check.failed else 0)


if __name__ == "__main__":
    main()
