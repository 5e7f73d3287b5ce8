"""What `make bench-engine` measures the engine against: the same model in PyTorch, with diffusers and peft.

A plain eager loop with the settings that served it best on a CPU: `inference_mode` without gradients, scaled dot
product attention (diffusers' own choice), `zero_grad(set_to_none)`, fused AdamW, `_foreach` updates of the moving
average, and no value read back in a step.

Reads a request per line and answers each with a line of JSON:

    check NAME      {"values": [...]}    numbers that the engine must find too, so that both do the same work
    measure NAME    {"seconds": s}       the time of one evaluation or step, the mean over `repeats`

NAME is `guided`, or a method (`mlcm`, `lcm`) and a student (`full`, `lora`), as in `mlcm lora`.
"""

import argparse
import copy
import json
import sys
import time

try:
    import torch
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    from safetensors.torch import load_file
except ImportError as error:
    sys.exit(f"{error.name} is missing: pip install torch==2.11.0 diffusers transformers peft safetensors")

HUBER_C = 0.001
EMA_DECAY = 0.95


class Problem:
    """The teacher's folder, the rows, and the numbers of the task; the engine reads the same two files."""

    def __init__(self, folder):
        with open(f"{folder}/problem.json", encoding="utf-8") as file:
            self.numbers = json.load(file)
        rows = load_file(f"{folder}/rows.safetensors")
        self.z, self.eps_w, self.t = rows["z"], rows["eps_w"], rows["t"]
        self.t_next, self.target = rows["t_next"], rows["target"]
        self.context, self.null = rows["context"], rows["null"]
        abar = DDIMScheduler.from_pretrained(self.numbers["teacher"], subfolder="scheduler").alphas_cumprod
        self.alpha, self.sigma = abar.sqrt(), (1 - abar).sqrt()

    def unet(self):
        return UNet2DConditionModel.from_pretrained(
            self.numbers["teacher"], subfolder="unet", torch_dtype=torch.float32
        ).eval()

    def heads(self, z, eps, t):
        """x0 and eps of a network that predicts epsilon."""
        alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in (self.alpha, self.sigma))
        return (z - sigma * eps) / alpha, eps

    def ddim(self, x0, eps, t):
        alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in (self.alpha, self.sigma))
        return alpha * x0 + sigma * eps


class Walk:
    """The teacher with guidance: conditional and null pass in one batch, then a DDIM step."""

    def __init__(self, problem):
        self.problem, self.unet = problem, problem.unet().requires_grad_(False)
        self.null = problem.null.expand_as(problem.context)
        self.both = torch.cat([self.null, problem.context])

    def predict(self, z, t):
        null, cond = self.unet(
            torch.cat([z, z]), torch.cat([t, t]), encoder_hidden_states=self.both, return_dict=False
        )[0].chunk(2)
        return null + self.problem.numbers["guidance"] * (cond - null)

    @torch.inference_mode()
    def step(self):
        p = self.problem
        return p.ddim(*p.heads(p.z, self.predict(p.z, p.t), p.t), p.t_next)

    def check(self):
        return [self.step().square().mean().item()]


class Training:
    """A student, `full` or `lora`, with its optimizer; `loss` is its method."""

    def __init__(self, problem, student):
        self.problem, self.kind = problem, student
        self.unet = problem.unet().requires_grad_(student == "full")
        if student == "lora":
            lora = problem.numbers["lora"]
            self.unet.add_adapter(
                LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["targets"])
            )
        self.trainable = [p for p in self.unet.parameters() if p.requires_grad]
        numbers = problem.numbers
        self.optimizer = torch.optim.AdamW(
            self.trainable,
            lr=numbers["rate"],
            betas=tuple(numbers["betas"]),
            eps=numbers["epsilon"],
            weight_decay=numbers["weight_decay"],
            fused=True,
        )

    def student(self, z, t, context, unet=None):
        return (unet or self.unet)(z, t, encoder_hidden_states=context, return_dict=False)[0]

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, self.problem.numbers["grad_clip"], foreach=True)
        self.optimizer.step()
        return loss.detach()


class Mlcm(Training):
    """The engine's own step: the teacher's part is read from the rows."""

    def loss(self):
        p = self.problem
        with torch.inference_mode():
            advanced = p.ddim(*p.heads(p.z, p.eps_w, p.t), p.t_next)
            free = (p.t_next > p.target).nonzero().view(-1)
            z, t = advanced[free], p.t_next[free]
            eps = self.student(z, t, p.context[free])
            target = advanced.index_copy(0, free, p.ddim(*p.heads(z, eps, t), p.target[free]))
        eps = self.student(p.z, p.t, p.context)
        landed = p.ddim(*p.heads(p.z, eps, p.t), p.target)
        return (landed - target.clone()).square().mean()

    def check(self):
        # Adapters start from other random numbers here and there, and so only their first loss is the same.
        losses = [self.step().item() for _ in range(3 if self.kind == "full" else 1)]
        return [sum(p.numel() for p in self.trainable), *losses]


class Lcm(Training):
    """Latent consistency distillation as in diffusers' examples: teacher with guidance, target network, Huber loss.

    With adapters the target is the student itself, without gradients, and no average is kept.
    """

    def __init__(self, problem, student):
        super().__init__(problem, student)
        self.teacher = Walk(problem)
        self.average = copy.deepcopy(self.unet).requires_grad_(False) if student == "full" else None
        if self.average is not None:
            self.averaged = list(self.average.parameters())
        scaled = 10.0 * torch.arange(1000)
        self.c_skip = 0.25 / (scaled.square() + 0.25)
        self.c_out = scaled / (scaled.square() + 0.25).sqrt()

    def clean(self, z, eps, t):
        x0, _ = self.problem.heads(z, eps, t)
        return self.c_skip[t].view(-1, 1, 1, 1) * z + self.c_out[t].view(-1, 1, 1, 1) * x0

    def loss(self):
        p = self.problem
        with torch.inference_mode():
            advanced = self.teacher.step()
            eps = self.student(advanced, p.t_next, p.context, self.average)
            target = self.clean(advanced, eps, p.t_next)
        found = self.clean(p.z, self.student(p.z, p.t, p.context), p.t)
        return ((found - target.clone()).square() + HUBER_C**2).sqrt().sub(HUBER_C).mean()

    def step(self):
        loss = super().step()
        if self.average is not None:
            with torch.no_grad():
                torch._foreach_lerp_(self.averaged, self.trainable, 1 - EMA_DECAY)
        return loss


def timed(step, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def work_of(problem, name):
    if name == "guided":
        return Walk(problem)
    method, student = name.split()
    return {"mlcm": Mlcm, "lcm": Lcm}[method](problem, student)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problem", help="folder with problem.json and rows.safetensors")
    problem = Problem(parser.parse_args().problem)
    torch.set_num_threads(problem.numbers["threads"])
    works = {}
    for line in sys.stdin:
        what, name = line.split(maxsplit=1)
        if name not in works:
            works[name] = work_of(problem, name.strip())
        work = works[name]
        if what == "check":
            answer = {"values": work.check()}
        else:
            answer = {"seconds": timed(work.step, problem.numbers["repeats"])}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
