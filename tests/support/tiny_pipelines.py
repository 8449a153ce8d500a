"""Tiny random diffusion models in diffusers' layout, made from configurations alone; the same bytes every time.

Torch takes seconds to load, so tests make them in a process of its own: `folder("flux-fill")`.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

CACHE = Path(__file__).parents[2] / ".cache" / "tiny-pipelines"
KINDS = ("flux-fill", "flux", "sd", "sd-inpaint")
FACTOR = 8
_LATENTS = {"flux": 16, "sd": 4}
_WIDTH = 32
_LETTERS = [chr(code) for code in range(33, 127)]


@cache
def folder(kind: str) -> Path:
    """The folder of a tiny model; made by the first who asks, and again when this file has changed."""
    made = CACHE / kind
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = made / ".made"
        if not stamp.exists() or stamp.stat().st_mtime < Path(__file__).stat().st_mtime:
            shutil.rmtree(made, ignore_errors=True)
            subprocess.run(
                [sys.executable, "-m", "tests.support.tiny_pipelines", kind, made],
                check=True,
                cwd=Path(__file__).parents[2],
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
            stamp.touch()
    return made


def build(kind: str, made: Path) -> None:
    """Save a model of `kind` in the folder `made`."""
    import diffusers
    import torch

    torch.manual_seed(len(kind))
    family = "flux" if kind.startswith("flux") else "sd"
    parts = {"vae": _vae(_LATENTS[family]), **_clip(projection=_WIDTH)}
    if family == "flux":
        parts |= {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), **_t5()}
        parts["transformer"] = _transformer(mask_channels=0 if kind == "flux" else 4 * FACTOR**2)
        pipeline: Any = diffusers.FluxPipeline if kind == "flux" else diffusers.FluxFillPipeline
    else:
        parts |= {"scheduler": _ddim(), "safety_checker": None, "feature_extractor": None, "image_encoder": None}
        parts["unet"] = _unet(in_channels=4 if kind == "sd" else 9)
        parts["requires_safety_checker"] = False
        inpaint = kind == "sd-inpaint"
        pipeline = diffusers.StableDiffusionInpaintPipeline if inpaint else diffusers.StableDiffusionPipeline
    pipeline(**parts).save_pretrained(made, safe_serialization=True)


def _vae(latents: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=latents,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        shift_factor=0.1 if latents == 16 else None,
        scaling_factor=0.36 if latents == 16 else 0.18,
        use_quant_conv=latents == 4,
        use_post_quant_conv=latents == 4,
    )


def _clip(projection: int) -> dict[str, Any]:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=projection,
        max_position_embeddings=77,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77)
    return {"text_encoder": CLIPTextModel(config), "tokenizer": tokenizer}


def _t5() -> dict[str, Any]:
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = T5TokenizerFast(
        vocab=[*special, *((letter, -4.0) for letter in _LETTERS)], extra_ids=0, model_max_length=512
    )
    config = T5Config(
        vocab_size=len(tokenizer), d_model=_WIDTH, d_kv=8, d_ff=2 * _WIDTH, num_layers=1, num_heads=4
    )
    return {"text_encoder_2": T5EncoderModel(config), "tokenizer_2": tokenizer}


def _transformer(mask_channels: int) -> Any:
    from diffusers import FluxTransformer2DModel

    packed = 4 * _LATENTS["flux"]
    return FluxTransformer2DModel(
        in_channels=packed + (packed + mask_channels if mask_channels else 0),
        out_channels=packed,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def _unet(in_channels: int) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def _ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]))
