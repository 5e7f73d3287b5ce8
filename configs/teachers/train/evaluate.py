"""Measures a teacher folder: the VAE, DDIM sampling, and the undistilled student baseline.

    evaluate.py TEACHER_DIR vae
    evaluate.py TEACHER_DIR adherence PROMPTS [--guidance 1,2,3] [--steps 25] [--samples N]
    evaluate.py TEACHER_DIR report PROMPTS --guidance W [--samples N]

Prints one JSON object per measurement.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from models import LATENT, abar, tokenize
from scenes import draw_many
from scorer import Scorer

BATCH = 128
# The student's own times: predict x0, re-noise to the next, and stop after the last.
TLCM9 = {
    1: [999],
    2: [999, 499],
    4: [999, 749, 499, 124],
    8: [999, 874, 749, 624, 499, 374, 249, 124],
}
DDIM_STEPS = (2, 4, 8, 25, 50)


class Teacher:
    """A teacher folder, in f32."""

    def __init__(self, folder):
        self.vae = AutoencoderKL.from_pretrained(folder / "vae").eval().requires_grad_(False)
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval().requires_grad_(False)
        # Without a dtype, transformers would keep this one in the f16 of the file.
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.scorer = Scorer(folder / "scorer" / "scorer.json")
        self.alpha, self.sigma = abar().sqrt().float(), (1 - abar()).sqrt().float()

    def encode_text(self, captions):
        """Hidden states [n, tokens, width] of captions."""
        return self.text_encoder(tokenize(self.tokenizer, captions)).last_hidden_state

    def predict(self, z, t, states, empty, guidance):
        """(x0, eps) at one time, with eps = null + w (cond - null); w = 1 needs no null pass."""
        eps = self.unet(z, t, states).sample
        if guidance != 1:
            null = self.unet(z, t, empty.expand(len(z), -1, -1)).sample
            eps = null + guidance * (eps - null)
        return (z - self.sigma[t] * eps) / self.alpha[t], eps

    @torch.no_grad()
    def sample(self, captions, sampler, guidance, seed):
        """Final latents [n, ...]; `sampler(teacher, z, predict, generator)` walks from pure noise."""
        generator = torch.Generator().manual_seed(seed)
        empty = self.encode_text([""])
        finals = []
        for start in range(0, len(captions), BATCH):
            states = self.encode_text(captions[start : start + BATCH])
            z = torch.randn(len(states), *LATENT, generator=generator)
            finals.append(
                sampler(self, z, lambda z, t: self.predict(z, t, states, empty, guidance), generator)
            )
        return torch.cat(finals)

    @torch.no_grad()
    def decode(self, latents):
        """u8 pictures [n, height, width, 3]."""
        pixels = [self.vae.decode(z / self.vae.config.scaling_factor).sample for z in latents.split(BATCH)]
        levels = (torch.cat(pixels) * 127.5 + 127.5).round().clamp(0, 255)
        return levels.to(torch.uint8).permute(0, 2, 3, 1).numpy()

    def judge(self, images, captions):
        """(mean share of right attributes, share right by attribute)."""
        shares, tally = [], {}
        for image, caption in zip(images, captions):
            verdicts = self.scorer.verdicts(image, caption)
            shares.append(sum(right for _, right in verdicts) / len(verdicts))
            for name, right in verdicts:
                tally.setdefault(name, []).append(right)
        return float(np.mean(shares)), {name: round(float(np.mean(v)), 4) for name, v in tally.items()}


def ddim(steps):
    """DDIM with `steps` steps over t_i = round(999 (1 - i/n)), ending at index 0."""
    times = [round(999 * (1 - i / steps)) for i in range(steps + 1)]

    def walk(teacher, z, predict, _generator):
        for t, u in zip(times, times[1:]):
            x0, eps = predict(z, t)
            z = teacher.alpha[u] * x0 + teacher.sigma[u] * eps
        return z

    return walk


def tlcm9(steps):
    """The student's sampler: x0, then fresh noise to the next time; the last x0 is the answer."""
    times = TLCM9[steps]

    def walk(teacher, z, predict, generator):
        for index, t in enumerate(times):
            x0, _ = predict(z, t)
            if index + 1 < len(times):
                u = times[index + 1]
                z = teacher.alpha[u] * x0 + teacher.sigma[u] * torch.randn(z.shape, generator=generator)
        return x0

    return walk


def fits_apart(a, b):
    """Frechet distance |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of Gaussian fits to rows."""
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(ca)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * cross).item()


def frechet(a, b):
    """The distance of the distributions behind two samples of latents, extrapolated to an infinite sample
    (arXiv 1911.07023): the fits alone are 14 apart for two sets of 1000 samples of the same teacher.
    """
    a, b = (x.flatten(1).double() for x in (a, b))
    halves = sum(fits_apart(a[first::2], b[first::2]) for first in (0, 1)) / 2
    return 2 * fits_apart(a, b) - halves


def emit(**fields):
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in fields.items()}), flush=True)


def measure_vae(teacher, n):
    """Adherence of drawn pictures, and of their reconstructions."""
    images, captions = draw_many(n, seed=10_000, held_out=True)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = torch.cat([teacher.vae.encode(p).latent_dist.mean for p in pixels.split(BATCH)])
    back = teacher.decode(latents * teacher.vae.config.scaling_factor)
    for name, pictures in (("drawn", images), ("reconstructed", back)):
        share, by_attribute = teacher.judge(pictures, captions)
        emit(what=name, adherence=share, **by_attribute)
    emit(what="reconstruction", root_mean_square=float(np.sqrt(np.mean((back / 1.0 - images) ** 2))))


def measure_adherence(teacher, captions, steps, guidances):
    """DDIM adherence over guidance scales."""
    for guidance in guidances:
        latents = teacher.sample(captions, ddim(steps), guidance, seed=1)
        share, by_attribute = teacher.judge(teacher.decode(latents), captions)
        emit(what=f"ddim {steps}", guidance=guidance, adherence=share, **by_attribute)


def measure_report(teacher, captions, guidance):
    """The card's numbers. Frechet distances are to 50-step samples from other noise."""
    reference = teacher.sample(captions, ddim(50), guidance, seed=2)
    runs = [(f"ddim {n}", ddim(n), guidance) for n in DDIM_STEPS]
    runs += [(f"undistilled tlcm9 {n}", tlcm9(n), w) for w in (1.0, guidance) for n in TLCM9]
    for name, sampler, w in runs:
        latents = teacher.sample(captions, sampler, w, seed=1)
        share, by_attribute = teacher.judge(teacher.decode(latents), captions)
        distance = frechet(latents, reference)
        emit(what=name, guidance=w, adherence=share, latent_frechet=distance, **by_attribute)


def numbers(text):
    return [float(part) for part in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("what", choices=("vae", "adherence", "report"))
    parser.add_argument("prompts", type=Path, nargs="?")
    parser.add_argument("--guidance", type=numbers, default=[3.0])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--samples", type=int, default=1000)
    arguments = parser.parse_args()
    teacher = Teacher(arguments.teacher)
    if arguments.what == "vae":
        measure_vae(teacher, arguments.samples)
        return
    lines = arguments.prompts.read_text().splitlines()
    captions = [lines[index % len(lines)] for index in range(arguments.samples)]
    if arguments.what == "adherence":
        measure_adherence(teacher, captions, arguments.steps, arguments.guidance)
    else:
        measure_report(teacher, captions, arguments.guidance[0])


if __name__ == "__main__":
    main()
