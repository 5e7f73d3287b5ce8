"""What every training loop here shares: the learning rate, the running mean of weights, checkpoints."""

import math
import time

import torch

WARMUP = 200


def learning_rate(peak, step, steps):
    """Linear warm-up, then a cosine down to a hundredth of `peak`."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    progress = min((step - WARMUP) / max(steps - WARMUP, 1), 1.0)
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


class Trainer:
    """One model or several with their optimizer, running mean and checkpoint file.

    Batches are drawn from the step's number, so a resumed run sees what an
    unbroken one would have seen.
    """

    def __init__(self, modules, path, peak, steps, mean_decay, save_every=500):
        self.modules = torch.nn.ModuleDict(modules)
        self.path, self.peak, self.steps = path, peak, steps
        self.mean_decay, self.save_every = mean_decay, save_every
        self.optimizer = torch.optim.AdamW(
            self.modules.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.mean = {k: v.detach().clone() for k, v in self.modules.state_dict().items()}
        self.step = 0
        if path.exists():
            self.load()

    def load(self):
        state = torch.load(self.path)
        self.modules.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mean, self.step = state["mean"], state["step"]

    def save(self):
        state = {
            "weights": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mean": self.mean,
            "step": self.step,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self.path)

    def run(self, loss_of):
        """Trains to the last step; `loss_of(generator)` returns a dictionary whose `loss` is minimised."""
        begun, seen, sums = time.monotonic(), 0, {}
        while self.step < self.steps:
            torch.manual_seed(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.peak, self.step, self.steps)
            parts = loss_of(torch.Generator().manual_seed(self.step))
            parts["loss"].backward()
            torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            self.follow()
            seen += 1
            sums = {name: sums.get(name, 0.0) + part.item() for name, part in parts.items()}
            if self.step % 100 == 0 or self.step == self.steps:
                means = " ".join(f"{name}={total / seen:.5f}" for name, total in sums.items())
                seconds = (time.monotonic() - begun) / seen
                print(f"step={self.step} {means} seconds_per_step={seconds:.3f}", flush=True)
                begun, seen, sums = time.monotonic(), 0, {}
            if self.step % self.save_every == 0 or self.step == self.steps:
                self.save()

    @torch.no_grad()
    def follow(self):
        """Moves the running mean; early on it forgets faster, so that it is useful from the start."""
        decay = min(self.mean_decay, (1 + self.step) / (10 + self.step))
        for name, value in self.modules.state_dict().items():
            self.mean[name].lerp_(value, 1 - decay)
