"""The parts of the pipeline and the words they share: tokenizer, text encoder, VAE, UNet, schedule."""

import json
from collections import Counter

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scenes import SIZE

MAX_LENGTH = 16
TEXT_WIDTH = 128
LATENT = (4, SIZE // 4, SIZE // 4)
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def new_vae():
    """Three levels, so a factor of four; small, because the pictures are flat colours with sharp edges."""
    return AutoencoderKL(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT[0],
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def new_unet():
    """Two levels: 8 x 8 without and 4 x 4 with attention, which is where most of a training step's time went."""
    return UNet2DConditionModel(
        sample_size=LATENT[1],
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        block_out_channels=(32, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
    )


def new_text_encoder(tokenizer):
    """Two layers; its special ids are the tokenizer's."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_schedule():
    """Stable Diffusion's schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def abar():
    """Cumulative products of 1 - beta; f64 [1000]."""
    root = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    return (1 - root**2).cumprod(0)


def write_tokenizer(folder, captions):
    """A byte-pair tokenizer in which every word of `captions` is one token.

    Merges are taken by frequency, as byte-pair encoding does, until no word has a pair left.
    """
    words = sorted({word for caption in captions for word in caption.split()})
    counts = Counter(word for caption in captions for word in caption.split())
    pieces = {word: tuple(word[:-1]) + (word[-1] + "</w>",) for word in words}
    merges = []
    while any(len(symbols) > 1 for symbols in pieces.values()):
        pairs = Counter()
        for word, symbols in pieces.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += counts[word]
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        pieces = {word: merge(symbols, best) for word, symbols in pieces.items()}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = letters + [f"{c}</w>" for c in letters] + ["".join(pair) for pair in merges] + [BOS, EOS]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def merge(symbols, pair):
    """`symbols` with every occurrence of `pair`, from the left, made one symbol."""
    merged, index = [], 0
    while index < len(symbols):
        if symbols[index : index + 2] == pair:
            merged.append("".join(pair))
            index += 2
        else:
            merged.append(symbols[index])
            index += 1
    return tuple(merged)


def read_tokenizer(folder):
    """The tokenizer that `write_tokenizer` wrote."""
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer, captions):
    """Token ids, padded and cut to the context; i64 [n, MAX_LENGTH]."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
