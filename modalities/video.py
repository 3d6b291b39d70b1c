"""EVA-CLIP's vision transformer (Sun et al. 2023, arXiv 2303.15389) on frames, averaged over time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..datasets.registry import InputError, nearest
from . import Features, FrameSpec, register
from .weights import eva_names, load_pretrained

# Per-channel statistics that all CLIP models were trained with.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@register("eva_clip")
class EvaClipTower(nn.Module):
    """timm's Eva: a released model by name, or EVA-02-CLIP at any size.

    With `arch=None` the sizes below make an EVA-02-CLIP: learned and rotary positions, SwiGLU with a norm inside,
    a norm on the attention's output. Features are the class token after the final norm, averaged over frames.

    Args:
        frames: T, frames per clip.
        size: height and width in pixels, a multiple of the patch.
        arch: a timm model, such as "eva_giant_patch14_clip_224" (EVA-CLIP-g, the tower of VAST and GRAM) or
            "eva02_base_patch16_clip_224"; it fixes the five sizes below.
        width, depth, heads, patch: channels, blocks, attention heads, side of a patch in pixels.
        mlp_ratio: hidden over outer width of the MLP; 8/3 unless given, as SwiGLU has three matrices for two.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        gradient_checkpointing: recompute blocks in the backward pass.
        pretrained: weights: a file or folder (EVA-CLIP, open_clip, timm, VAST, GRAM), or the name of a Hugging Face
            repository.
    """

    translate = staticmethod(eva_names)

    def __init__(
        self,
        *,
        frames: int,
        size: int = 224,
        arch: str | None = None,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        patch: int | None = None,
        mlp_ratio: float | None = None,
        drop_path: float = 0.0,
        gradient_checkpointing: bool = False,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"width": width, "depth": depth, "heads": heads, "patch": patch, "mlp_ratio": mlp_ratio}
        given = {key: value for key, value in sizes.items() if value is not None}
        self.options: dict[str, Any] = {
            "frames": frames, "size": size, "arch": arch, **given, "drop_path": drop_path,
            "gradient_checkpointing": gradient_checkpointing,
        }  # fmt: skip
        self.trunk = _released(arch, given, size, drop_path) if arch else _sized(given, size, drop_path)
        for block in self.trunk.blocks:
            # Else timm reads the projection's weight past its module, where ZeRO-3 has not gathered it.
            block.attn.qkv_bias_separate = True
        self.trunk.set_grad_checkpointing(gradient_checkpointing)
        self.width = self.trunk.embed_dim
        self.spec = FrameSpec(frames=frames, size=size, mean=MEAN, std=STD)
        if pretrained is not None:
            load_pretrained(self, pretrained)

    def forward(self, frames: Tensor) -> Features:
        """frames uint8 (n, T, 3, size, size) -> pooled (n, d), tokens (n, T S, d), S = 1 + patches of a frame."""
        n, t = frames.shape[:2]
        dtype = self.trunk.patch_embed.proj.weight.dtype
        tokens = self.trunk(_normalised(frames.flatten(0, 1)).to(dtype)).unflatten(0, (n, t))
        return Features(pooled=tokens[:, :, 0].mean(dim=1), tokens=tokens.flatten(1, 2))


def _normalised(pixels: Tensor) -> Tensor:
    """uint8 (k, 3, H, W) -> (x / 255 - mean) / std in float32, whatever the towers run in."""
    mean, std = (torch.tensor(x, device=pixels.device).view(3, 1, 1) for x in (MEAN, STD))
    return torch.addcmul(-mean / std, pixels.float(), 1 / (255 * std))


def _released(arch: str, given: dict[str, Any], size: int, drop_path: float) -> nn.Module:
    import timm

    if given:
        raise InputError(f"eva_clip: arch={arch!r} fixes {', '.join(given)}; leave them out, or leave out arch")
    known = timm.list_models("eva*", module="eva")
    if arch.partition(".")[0] not in known:
        raise InputError(f"eva_clip: timm has no EVA model {arch!r}; {nearest(arch, known)}")
    trunk = timm.create_model(arch, img_size=size, num_classes=0, global_pool="", drop_path_rate=drop_path)
    _check_size(size, trunk.patch_embed.patch_size[0])
    return trunk


def _sized(given: dict[str, Any], size: int, drop_path: float) -> nn.Module:
    from timm.models.eva import Eva

    lacking = [key for key in ("width", "depth", "heads", "patch") if key not in given]
    if lacking:
        raise InputError(f"eva_clip: {', '.join(lacking)} not set; set all of width, depth, heads, patch, or set arch")
    width, depth, heads, patch = (given[key] for key in ("width", "depth", "heads", "patch"))
    if width % (4 * heads):
        raise InputError(f"eva_clip: width={width} is no multiple of 4 * heads={4 * heads}; rotary positions need it")
    _check_size(size, patch)
    return Eva(
        img_size=size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=0, global_pool="",
        mlp_ratio=given.get("mlp_ratio", 8 / 3), qkv_fused=False, swiglu_mlp=True, scale_mlp=True,
        scale_attn_inner=True, use_rot_pos_emb=True, ref_feat_shape=(16, 16), drop_path_rate=drop_path,
    )  # fmt: skip


def _check_size(size: int, patch: int) -> None:
    if size % patch:
        below = size - size % patch
        near = f"{below} or {below + patch}" if below else f"{patch}"
        raise InputError(f"eva_clip: size={size} is not a multiple of the patch {patch}; set it to {near}")
