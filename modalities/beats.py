"""BEATs (Chen et al. 2022, arXiv 2212.09058): a post-norm transformer over 16x16 patches of a log-mel filter bank.

State-dict names are those of the released checkpoints, but for one: the relative position bias, which the releases
list under every layer (one tensor, twelve names), lives in layer 0 alone.

Shapes: n samples, C audio clips a sample, F fbank frames, M mel bins, S = (F/patch)(M/patch) tokens, d width, H heads.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..datasets.registry import InputError
from . import FbankSpec, Features, register
from .weights import beats_names, load_pretrained


@register("beats")
class BeatsTower(nn.Module):
    """BEATs; the defaults are those of the released base models (90.3 M parameters).

    Pooled features are the mean over tokens, then over clips.

    Args:
        length: fbank frames per audio clip, a multiple of `patch` (10 ms each: 1024 is about 10 s).
        clips: audio clips per sample.
        mel_bins: a multiple of `patch`.
        width, layers, heads, feedforward: sizes of the transformer.
        patch: side of a patch, in frames and mel bins.
        patch_width: channels of the patch embedding, before the projection to `width`.
        conv_kernel, conv_groups: of the convolutional position embedding.
        buckets, max_distance: of the relative position bias, in tokens.
        dropout: on residual branches and on the input of the first layer.
        attention_dropout: on attention probabilities.
        layerdrop: chance that a sample skips a layer. The layer is computed all the same, so that ranks that draw
            differently still run the same collectives.
        gradient_checkpointing: recompute layers in the backward pass.
        pretrained: a BEATs, VAST or GRAM checkpoint file.
    """

    translate = staticmethod(beats_names)

    def __init__(
        self,
        *,
        length: int = 1024,
        clips: int = 1,
        mel_bins: int = 128,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        feedforward: int = 3072,
        patch: int = 16,
        patch_width: int = 512,
        conv_kernel: int = 128,
        conv_groups: int = 16,
        buckets: int = 320,
        max_distance: int = 800,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        layerdrop: float = 0.0,
        gradient_checkpointing: bool = False,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        _check_divides("length", length, "patch", patch)
        _check_divides("mel_bins", mel_bins, "patch", patch)
        _check_divides("width", width, "heads", heads)
        _check_divides("width", width, "conv_groups", conv_groups)
        self.options: dict[str, Any] = {
            "length": length, "clips": clips, "mel_bins": mel_bins, "width": width, "layers": layers, "heads": heads,
            "feedforward": feedforward, "patch": patch, "patch_width": patch_width, "conv_kernel": conv_kernel,
            "conv_groups": conv_groups, "buckets": buckets, "max_distance": max_distance, "dropout": dropout,
            "attention_dropout": attention_dropout, "layerdrop": layerdrop,
            "gradient_checkpointing": gradient_checkpointing,
        }  # fmt: skip
        self.width = width
        self.spec = FbankSpec(length=length, clips=clips, mel_bins=mel_bins)
        self.patch_embedding = nn.Conv2d(1, patch_width, kernel_size=patch, stride=patch, bias=False)
        self.layer_norm = nn.LayerNorm(patch_width)
        self.post_extract_proj = nn.Linear(patch_width, width) if patch_width != width else nn.Identity()
        self.encoder = Encoder(
            width, layers, heads, feedforward, conv_kernel, conv_groups, buckets, max_distance, dropout,
            attention_dropout, layerdrop, gradient_checkpointing,
        )  # fmt: skip
        if pretrained is not None:
            load_pretrained(self, pretrained)

    def forward(self, fbank: Tensor) -> Features:
        """fbank float (n, C, F, M), normalised as `spec` says -> pooled (n, d), tokens (n, C S, d)."""
        n, clips = fbank.shape[:2]
        x = fbank.flatten(0, 1).unsqueeze(1).to(self.patch_embedding.weight.dtype)
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)  # (n C, S, patch_width): time first, then frequency
        x = self.encoder(self.post_extract_proj(self.layer_norm(x)))
        x = x.unflatten(0, (n, clips))
        return Features(pooled=x.mean(dim=2).mean(dim=1), tokens=x.flatten(1, 2))


class Encoder(nn.Module):
    """Position embedding, then the layers; (n, S, d) -> (n, S, d)."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        feedforward: int,
        conv_kernel: int,
        conv_groups: int,
        buckets: int,
        max_distance: int,
        dropout: float,
        attention_dropout: float,
        layerdrop: float,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.layerdrop = layerdrop
        self.gradient_checkpointing = gradient_checkpointing
        self.pos_conv = nn.Sequential(PositionConv(width, conv_kernel, conv_groups), nn.GELU())
        self.layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            Layer(width, heads, feedforward, layers, dropout, attention_dropout) for _ in range(layers)
        )
        self.layers[0].self_attn.relative_attention_bias = nn.Embedding(buckets, heads)
        nn.init.normal_(self.layers[0].self_attn.relative_attention_bias.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.dropout(self.layer_norm(x))
        bias = self.position_bias(x.shape[1])
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                y = checkpoint(layer, x, bias, use_reentrant=False)
            else:
                y = layer(x, bias)
            x = self._drop_layer(x, y)
        return x

    def position_bias(self, tokens: int) -> Tensor:
        """(H, S, S): what each head adds to the logit of query i and key j, a function of j - i."""
        embedding = self.layers[0].self_attn.relative_attention_bias
        index = relative_buckets(tokens, self.buckets, self.max_distance).to(embedding.weight.device)
        by_distance = embedding(index).t()  # (H, 2S - 1), for j - i = 1 - S ... S - 1
        return by_distance.unfold(-1, tokens, 1).flip(-2)  # row i is the window that starts at j - i = -i

    def _drop_layer(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.training or self.layerdrop == 0:
            return y
        kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.layerdrop
        return torch.where(kept, y, x)


class PositionConv(nn.Module):
    """Grouped convolution over time with weight norm per kernel tap; the last output of an even kernel is cut off."""

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        v = torch.randn(width, width // groups, kernel) * math.sqrt(4 / (kernel * width))
        self.weight_v = nn.Parameter(v)
        self.weight_g = nn.Parameter(v.norm(dim=(0, 1), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(n, d, S) -> (n, d, S)."""
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))
        kernel = weight.shape[-1]
        return F.conv1d(x, weight, self.bias, padding=kernel // 2, groups=self.groups)[..., : x.shape[-1]]


class Layer(nn.Module):
    """Post-norm transformer layer, residuals scaled by alpha = (2 layers)^(1/4) (DeepNorm, arXiv 2203.00555)."""

    def __init__(
        self, width: int, heads: int, feedforward: int, layers: int, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.alpha = (2 * layers) ** 0.25
        self.self_attn = Attention(width, heads, attention_dropout)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, feedforward)
        self.fc2 = nn.Linear(feedforward, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self._initialise(beta=(8 * layers) ** -0.25)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.self_attn_layer_norm(self.alpha * x + self.dropout(self.self_attn(x, bias)))
        return self.final_layer_norm(self.alpha * x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))

    def _initialise(self, beta: float) -> None:
        attention = self.self_attn
        gains = {attention.q_proj: 1, attention.k_proj: 1, attention.v_proj: beta, attention.out_proj: beta}
        for linear, gain in {**gains, self.fc1: beta, self.fc2: beta}.items():
            nn.init.xavier_normal_(linear.weight, gain=gain)
            nn.init.zeros_(linear.bias)


class Attention(nn.Module):
    """Self-attention whose relative position bias is gated by the query (WavLM, arXiv 2110.13900, section 3.1)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.grep_linear = nn.Linear(width // heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))
        nn.init.normal_(self.grep_linear.weight, std=0.02)
        nn.init.zeros_(self.grep_linear.bias)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (n, S, d), bias (H, S, S) -> (n, S, d)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in projections)
        gated = self._gate(q) * bias.to(q.dtype)  # (n, H, S, S)
        p = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=gated, dropout_p=p)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _gate(self, q: Tensor) -> Tensor:
        """q (n, H, S, d/H) -> (n, H, S, 1), in [1, 2] while grep_a is 1: update * (reset * grep_a - 1) + 2."""
        update, reset = self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1).sigmoid().chunk(2, dim=-1)
        return update * (reset * self.grep_a - 1) + 2


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # the cached tensor must serve training too
def relative_buckets(tokens: int, buckets: int, max_distance: int) -> Tensor:
    """int64 (2S - 1,): bucket of each distance j - i from 1 - S to S - 1 (T5, arXiv 1910.10683, section 2.1).

    Half of the buckets are for keys to the right. Of each half, the first half holds one distance each, the rest
    grow logarithmically up to `max_distance`; the last takes everything beyond. Computed on the CPU, whatever the
    device: a logarithm that rounds differently would move a boundary.
    """
    distance = torch.arange(1 - tokens, tokens, device="cpu")
    half = buckets // 2
    exact = half // 2
    size = distance.abs()
    growth = torch.log(size.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(size < exact, size, far) + half * (distance > 0)


def _check_divides(name: str, value: int, by_name: str, by: int) -> None:
    if value % by:
        below = value - value % by
        near = f"{below} or {below + by}" if below else f"{by}"
        raise InputError(f"beats: {name}={value} is not a multiple of {by_name}={by}; set {name} to {near}")
