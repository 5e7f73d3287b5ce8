"""Trains the UNet and the text encoder together on the stored latents.

    train_unet.py WORK_DIR [--steps N]
"""

import argparse
from pathlib import Path

import torch

from loop import Trainer
from models import abar, new_text_encoder, new_unet, read_tokenizer, tokenize, write_tokenizer

BATCH = 64
PEAK = 1.5e-3
CAPTION_DROPOUT = 0.12
# Loss weights are min(SNR, this) / SNR: at low noise the VAE forgives what the mean square would punish.
MAX_SNR = 2.0


def new_parts(work):
    """(tokenizer, text encoder, UNet), freshly initialised."""
    tokenizer = read_tokenizer(work / "tokenizer")
    torch.manual_seed(0)
    # Channels last: a tenth faster on processors.
    return tokenizer, new_text_encoder(tokenizer), new_unet().to(memory_format=torch.channels_last)


def read(work):
    """(tokenizer, text encoder, UNet) with the running means of the checkpoint."""
    tokenizer, text_encoder, unet = new_parts(work)
    mean = torch.load(work / "unet.pt")["mean"]
    for name, module in (("text_encoder", text_encoder), ("unet", unet)):
        prefix = f"{name}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in mean.items() if k.startswith(prefix)})
        module.eval().requires_grad_(False)
    return tokenizer, text_encoder, unet


def draw_times(generator):
    """One time from each of BATCH slices of 0..999, more of them in the middle; i64 [BATCH], ascending.

    Slices keep the mean loss steady. The middle, where shapes are decided, is drawn
    twice as often as the ends, where there is little to learn.
    """
    u = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
    return (1000 * (u + 0.4 * torch.sin(2 * torch.pi * u) / (2 * torch.pi))).long().clamp(0, 999)


def train(work, latents, steps):
    """Runs to the last step from wherever the checkpoint is."""
    tokenizer, text_encoder, unet = new_parts(work)
    modules = {"text_encoder": text_encoder, "unet": unet}
    trainer = Trainer(modules, work / "unet.pt", PEAK, steps, mean_decay=0.999)
    ids = tokenize(tokenizer, latents["captions"])
    empty = tokenize(tokenizer, [""])
    alpha, sigma = abar().sqrt().float(), (1 - abar()).sqrt().float()
    snr = (alpha / sigma) ** 2
    weight = snr.clamp_max(MAX_SNR) / snr

    def loss_of(generator):
        rows = torch.randint(len(ids), (BATCH,), generator=generator)
        mean, deviation = latents["mean"][rows].float(), latents["deviation"][rows].float()
        clean = latents["scale"] * (mean + deviation * torch.randn(mean.shape, generator=generator))
        dropped = torch.rand(BATCH, 1, generator=generator) < CAPTION_DROPOUT
        states = text_encoder(torch.where(dropped, empty, ids[rows])).last_hidden_state
        times = draw_times(generator)
        noise = torch.randn(clean.shape, generator=generator)
        a, s = alpha[times, None, None, None], sigma[times, None, None, None]
        noisy = (a * clean + s * noise).contiguous(memory_format=torch.channels_last)
        predicted = unet(noisy, times, states).sample
        square = (predicted - noise).square().mean((1, 2, 3))
        return {"loss": (weight[times] * square).mean(), "low": square[: BATCH // 2].mean(), "high": square[BATCH // 2 :].mean()}

    trainer.run(loss_of)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=7000)
    arguments = parser.parse_args()
    latents = torch.load(arguments.work / "latents.pt")
    if not (arguments.work / "tokenizer").exists():
        write_tokenizer(arguments.work / "tokenizer", latents["captions"])
    train(arguments.work, latents, arguments.steps)


if __name__ == "__main__":
    main()
