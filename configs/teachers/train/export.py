"""Writes the teacher folder from the checkpoints: a Stable Diffusion pipeline in f16.

    export.py WORK_DIR TEACHER_DIR
"""

import argparse
import json
import shutil
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file

import rules
import train_unet
import train_vae
from models import new_schedule


def save_weights(module, path, prefix=""):
    """f16 weights, contiguous; `prefix` goes before every name."""
    state = {prefix + k: v.half().contiguous() for k, v in module.state_dict().items()}
    if any(not v.isfinite().all() for v in state.values()):
        raise ValueError(f"{path.name}: a weight does not fit f16")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"format": "pt"})


def save_text_encoder(text_encoder, folder):
    """The layout that every reader knows, whose names begin with `text_model.`."""
    bare = not any(name.startswith("text_model.") for name in text_encoder.state_dict())
    save_weights(text_encoder, folder / "model.safetensors", "text_model." if bare else "")
    text_encoder.config.architectures = ["CLIPTextModel"]
    config = text_encoder.config.to_dict() | {"dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_index(folder):
    """model_index.json, naming the parts of the pipeline."""
    parts = {
        "feature_extractor": (None, None),
        "image_encoder": (None, None),
        "safety_checker": (None, None),
        "scheduler": ("diffusers", "DDIMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "requires_safety_checker": False,
        **parts,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("teacher", type=Path)
    arguments = parser.parse_args()
    folder = arguments.teacher
    vae = train_vae.read(arguments.work)
    vae.register_to_config(scaling_factor=torch.load(arguments.work / "latents.pt")["scale"])
    _, text_encoder, unet = train_unet.read(arguments.work)
    for name, module in (("vae", vae), ("unet", unet)):
        save_weights(module, folder / name / "diffusion_pytorch_model.safetensors")
        module.save_config(folder / name)
    save_text_encoder(text_encoder, folder / "text_encoder")
    new_schedule().save_pretrained(folder / "scheduler")
    shutil.copytree(arguments.work / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    (folder / "scorer").mkdir(exist_ok=True)
    (folder / "scorer" / "scorer.json").write_text(json.dumps(rules.rules(), indent=1) + "\n")
    write_index(folder)


if __name__ == "__main__":
    main()
