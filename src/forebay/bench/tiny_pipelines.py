"""A program that makes diffusion models of random weights in diffusers' layout, from configurations alone.

The same order makes the same bytes. It refuses to import anything else of this package, and to fetch anything.
"""

import json
import os
import sys
from typing import Any, TextIO

KINDS = ("flux-fill", "flux", "sd", "sd-inpaint", "xl", "sd15")
"""All but the last are tiny; that one is as large as Stable Diffusion 1.5, to see what the server adds to such a model."""

_FACTOR = 8
_LATENTS = {"flux": 16, "sd": 4}
_TEXT_WIDTH = 32
_LARGE_TEXT_WIDTH = 768
_XL = {
    "cross_attention_dim": 2 * _TEXT_WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": _TEXT_WIDTH + 6 * 8,
    "use_linear_projection": True,
}
_LETTERS = [chr(code) for code in range(33, 127)]


def main() -> None:
    """Make what each line of standard input asks for: `kind`, `folder`, and the `width` of what paints in a tiny one."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    for line in sys.stdin:
        _build(**json.loads(line))
        _answer(answers, {"made": True})


def _answer(answers: TextIO, said: dict[str, Any]) -> None:
    answers.write(json.dumps(said) + "\n")
    answers.flush()


def _build(kind: str, folder: str, width: int = 16) -> None:
    import diffusers  # noqa: PLC0415  # what it prints when it is loaded goes to standard error
    import torch  # noqa: PLC0415

    torch.manual_seed(len(kind))
    family = "flux" if kind.startswith("flux") else "sd"
    large = kind == "sd15"
    vae = _large_vae(diffusers) if large else _vae(diffusers, _LATENTS[family])
    parts = {"vae": vae, **_clip(_LARGE_TEXT_WIDTH if large else _TEXT_WIDTH)}
    if family == "flux":
        parts |= {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), **_t5()}
        parts["transformer"] = _transformer(diffusers, 0 if kind == "flux" else 4 * _FACTOR**2, width)
        pipeline: Any = diffusers.FluxPipeline if kind == "flux" else diffusers.FluxFillPipeline
    elif kind == "xl":
        parts |= {"scheduler": _ddim(diffusers), **_second(_clip(with_projection=True))}
        parts["unet"] = _unet(diffusers, 4, width, **_XL)
        parts["add_watermarker"] = False
        pipeline = diffusers.StableDiffusionXLPipeline
    else:
        parts |= {"scheduler": _ddim(diffusers), "safety_checker": None, "feature_extractor": None}
        parts |= {"image_encoder": None, "requires_safety_checker": False}
        parts["unet"] = _large_unet(diffusers) if large else _unet(diffusers, 4 if kind == "sd" else 9, width)
        inpaint = kind != "sd"
        pipeline = diffusers.StableDiffusionInpaintPipeline if inpaint else diffusers.StableDiffusionPipeline
    pipeline(**parts).save_pretrained(folder, safe_serialization=True)


def _vae(diffusers: Any, latents: int) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=latents,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=128,
        shift_factor=0.1 if latents == 16 else None,
        scaling_factor=0.36 if latents == 16 else 0.18,
        use_quant_conv=latents == 4,
        use_post_quant_conv=latents == 4,
    )


def _large_vae(diffusers: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        layers_per_block=2,
        norm_num_groups=32,
        sample_size=512,
        scaling_factor=0.18215,
    )


def _second(parts: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}_2": part for name, part in parts.items()}


def _clip(width: int = _TEXT_WIDTH, *, with_projection: bool = False) -> dict[str, Any]:
    from tokenizers.pre_tokenizers import ByteLevel  # noqa: PLC0415
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: PLC0415

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=width,
        max_position_embeddings=77,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77)
    encoder = CLIPTextModelWithProjection if with_projection else CLIPTextModel
    return {"text_encoder": encoder(config), "tokenizer": tokenizer}


def _t5() -> dict[str, Any]:
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast  # noqa: PLC0415

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = T5TokenizerFast(
        vocab=[*special, *((letter, -4.0) for letter in _LETTERS)], extra_ids=0, model_max_length=512
    )
    config = T5Config(
        vocab_size=len(tokenizer), d_model=_TEXT_WIDTH, d_kv=8, d_ff=2 * _TEXT_WIDTH, num_layers=1, num_heads=4
    )
    return {"text_encoder_2": T5EncoderModel(config), "tokenizer_2": tokenizer}


def _transformer(diffusers: Any, mask_channels: int, width: int) -> Any:
    packed = 4 * _LATENTS["flux"]
    return diffusers.FluxTransformer2DModel(
        in_channels=packed + (packed + mask_channels if mask_channels else 0),
        out_channels=packed,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=width // 8,
        joint_attention_dim=_TEXT_WIDTH,
        pooled_projection_dim=_TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def _unet(diffusers: Any, in_channels: int, width: int, **more: Any) -> Any:
    settings = {"cross_attention_dim": _TEXT_WIDTH, **more}
    return diffusers.UNet2DConditionModel(
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=8,
        **settings,
    )


def _large_unet(diffusers: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        sample_size=64,
        in_channels=9,
        out_channels=4,
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        attention_head_dim=8,
        cross_attention_dim=_LARGE_TEXT_WIDTH,
    )


def _ddim(diffusers: Any) -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


if __name__ == "__main__":
    main()
