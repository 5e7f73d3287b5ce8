"""Trains the VAE, and encodes the training set once so that nothing later pays for it.

    train_vae.py WORK_DIR [--steps N]
"""

import argparse
from pathlib import Path

import torch

import data
from loop import Trainer
from models import new_vae

BATCH = 32
# Small on purpose: the latents need to be smooth, not Gaussian.
KL_WEIGHT = 1e-5


def to_pixels(images):
    """u8 [n, height, width, 3] to f32 [n, 3, height, width] in -1..1."""
    pixels = images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


def train(work, images, steps):
    """The VAE with the running mean of its weights."""
    torch.manual_seed(0)
    vae = new_vae().to(memory_format=torch.channels_last)
    trainer = Trainer({"vae": vae}, work / "vae.pt", peak=2e-3, steps=steps, mean_decay=0.995, save_every=200)

    def loss_of(generator):
        pixels = to_pixels(images[torch.randint(len(images), (BATCH,), generator=generator)])
        posterior = vae.encode(pixels).latent_dist
        error = vae.decode(posterior.sample(generator)).sample - pixels
        fit = error.abs().mean() + error.square().mean()
        kl = posterior.kl().mean()
        return {"loss": fit + KL_WEIGHT * kl, "fit": fit, "kl": kl}

    trainer.run(loss_of)
    return read(work)


def read(work):
    """The trained VAE, from its checkpoint."""
    vae = new_vae()
    mean = torch.load(work / "vae.pt")["mean"]
    vae.load_state_dict({name.removeprefix("vae."): value for name, value in mean.items()})
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.no_grad()
def encode(vae, images):
    """Mean and standard deviation of every picture's latent; two f16 [n, 4, 8, 8]."""
    means, deviations = [], []
    for batch in images.split(256):
        posterior = vae.encode(to_pixels(batch)).latent_dist
        means.append(posterior.mean.half())
        deviations.append(posterior.std.half())
    return torch.cat(means).contiguous(), torch.cat(deviations).contiguous()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=1130)
    arguments = parser.parse_args()
    images, captions = data.load(arguments.work)
    images = torch.from_numpy(images)
    vae = train(arguments.work, images, arguments.steps)
    mean, deviation = encode(vae, images)
    scale = 1 / mean.float().std().item()
    latents = {"mean": mean, "deviation": deviation, "scale": scale, "captions": captions}
    torch.save(latents, arguments.work / "latents.pt")
    print(f"latents={tuple(mean.shape)} scaling_factor={scale:.5f}")


if __name__ == "__main__":
    main()
