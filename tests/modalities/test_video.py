"""EVA-CLIP: frames one by one, pixels, the sizes and names of the released towers."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.nn import functional as F

from trivium.datasets.registry import InputError
from trivium.modalities import build
from trivium.modalities.video import MEAN, STD
from trivium.modalities.weights import eva_names

TINY = {"frames": 3, "size": 16, "width": 16, "depth": 2, "heads": 2, "patch": 8}


def tiny(**options):
    torch.manual_seed(0)
    return build("eva_clip", **{**TINY, **options})


def clips(n: int = 2, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 3, 3, size, size), dtype=torch.uint8, generator=generator)


def test_mean_over_frames_by_a_loop():
    tower = tiny().eval()
    frames = clips()
    features = tower(frames)
    assert features.tokens.shape == (2, 3 * 5, 16)  # class token and 2 x 2 patches a frame
    for i in range(2):
        one_by_one = [tower(frames[i : i + 1, t : t + 1]) for t in range(3)]
        mean = sum(one.pooled[0] for one in one_by_one) / 3
        torch.testing.assert_close(features.pooled[i], mean, rtol=0, atol=1e-6)
        tokens = torch.cat([one.tokens[0] for one in one_by_one])
        torch.testing.assert_close(features.tokens[i], tokens, rtol=0, atol=1e-5)


def test_pooled_is_timms_own_feature_of_float_pixels():
    """Past our normalisation and pooling: torchvision's normalize, timm's forward_features, its class token."""
    from torchvision.transforms.functional import normalize

    tower = tiny().eval()
    frames = clips()
    pixels = normalize(frames.flatten(0, 1).float() / 255, MEAN, STD)
    expected = tower.trunk.forward_features(pixels)[:, 0].view(2, 3, 16).mean(dim=1)
    torch.testing.assert_close(tower(frames).pooled, expected, rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for on in (False, True):
        tower = tiny(gradient_checkpointing=on, drop_path=0.3).double().train()
        torch.manual_seed(7)
        tower(clips()).pooled.pow(3).sum().backward()
        gradients.append([p.grad for p in tower.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-12, atol=1e-12)


def test_every_parameter_trains_and_has_a_dimension():
    tower = tiny().train()
    tower(clips()).tokens.pow(3).sum().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None or p.dim() == 0] == []


def test_drop_path_follows_the_seed_and_rests_in_evaluation():
    tower = tiny(drop_path=0.5)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(tower.train()(clips()).pooled)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(tower.eval()(clips()).pooled, tower(clips()).pooled)


def test_an_absent_video_is_finite():
    tower = tiny().train()
    tower(torch.zeros(2, 3, 3, 16, 16, dtype=torch.uint8)).pooled.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in tower.parameters())


def test_weights_pass_through_their_modules():
    """ZeRO-3 gathers a weight when its module is called: with every call's weights watched, none is used outside."""
    with torch.device("meta"):
        tower = build("eva_clip", frames=1, size=28, arch="eva_giant_patch14_clip_224")
    called = set()
    for name, module in tower.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    tower(torch.zeros(1, 1, 3, 28, 28, dtype=torch.uint8, device="meta"))
    owners = {name.rpartition(".")[0] for name, _ in tower.named_parameters()}
    assert owners - called == set()


def test_the_giant_has_the_names_and_shapes_of_vasts_vision_tower():
    """VAST, GRAM and EVA01-CLIP-g: 40 blocks of width 1408 with biases for queries and values alone."""
    with torch.device("meta"):
        tower = build("eva_clip", frames=8, arch="eva_giant_patch14_clip_224")
    d, hidden = 1408, 6144
    theirs = {
        "cls_token": (1, 1, d), "pos_embed": (1, 257, d),
        "patch_embed.proj.weight": (d, 3, 14, 14), "patch_embed.proj.bias": (d,),
        "norm.weight": (d,), "norm.bias": (d,), "head.weight": (1024, d), "head.bias": (1024,),
    }  # fmt: skip
    for i in range(40):
        block = {
            "norm1.weight": (d,), "norm1.bias": (d,), "norm2.weight": (d,), "norm2.bias": (d,),
            "attn.q_bias": (d,), "attn.v_bias": (d,), "attn.qkv.weight": (3 * d, d),
            "attn.proj.weight": (d, d), "attn.proj.bias": (d,),
            "mlp.fc1.weight": (hidden, d), "mlp.fc1.bias": (hidden,),
            "mlp.fc2.weight": (d, hidden), "mlp.fc2.bias": (d,),
        }  # fmt: skip
        theirs |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    theirs = {f"vision_encoder.visual.{key}": shape for key, shape in theirs.items()}
    theirs |= {"vision_encoder.text.ln_final.weight": (768,), "audio_encoder.layer_norm.weight": (512,)}
    ours = {key: tuple(value.shape) for key, value in tower.state_dict().items()}
    assert {own: theirs[key] for key, own in eva_names(theirs).items()} == ours
    assert sum(p.numel() for p in tower.parameters()) == 1_012_588_928 - 1024 * d - 1024  # without the unused head


def test_the_giants_arithmetic_at_tiny_size(monkeypatch):
    """EVA-01's block by hand: fused projection, no key bias, eps 1e-6, GELU; timm's module must do the same."""
    from timm.models.eva import Eva

    tower = tiny().eval()
    torch.manual_seed(3)
    tower.trunk = Eva(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0, global_pool="")
    for p in tower.parameters():
        torch.nn.init.normal_(p, std=0.3)
    state = {key.removeprefix("trunk."): value for key, value in tower.state_dict().items()}
    expected = eva01(state, clips(), heads=2)
    torch.testing.assert_close(tower(clips()).pooled, expected, rtol=1e-4, atol=1e-5)


def eva01(state: dict[str, torch.Tensor], frames: torch.Tensor, heads: int) -> torch.Tensor:
    """One block of EVA-CLIP-g on (n, T, 3, H, W), written from its description."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], eps=1e-6)

    n, t = frames.shape[:2]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    x = (frames.flatten(0, 1) / 255 - mean) / std
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
    x = torch.cat([state["cls_token"].expand(n * t, -1, -1), x.flatten(2).mT], dim=1) + state["pos_embed"]
    y = norm(x, "blocks.0.norm1")
    q, k, v = (y @ part.T for part in state["blocks.0.attn.qkv.weight"].chunk(3))
    q, v = q + state["blocks.0.attn.q_bias"], v + state["blocks.0.attn.v_bias"]
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
    y = ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1) @ v
    y = y.transpose(1, 2).flatten(2) @ state["blocks.0.attn.proj.weight"].T + state["blocks.0.attn.proj.bias"]
    x = x + y
    y = norm(x, "blocks.0.norm2") @ state["blocks.0.mlp.fc1.weight"].T + state["blocks.0.mlp.fc1.bias"]
    x = x + F.gelu(y) @ state["blocks.0.mlp.fc2.weight"].T + state["blocks.0.mlp.fc2.bias"]
    return norm(x, "norm")[:, 0].view(n, t, -1).mean(dim=1)


def test_spec_and_options_travel():
    tower = tiny(mlp_ratio=2.0, drop_path=0.1)
    assert pickle.loads(pickle.dumps(tower.spec)) == tower.spec
    assert (tower.spec.frames, tower.spec.size, tower.spec.mean) == (3, 16, MEAN)
    twin = build("eva_clip", **tower.options)
    assert twin.options == tower.options
    twin.load_state_dict(tower.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 20}, r"size=20 is not a multiple of the patch 8; set it to 16 or 24"),
        ({"heads": 3}, r"width=16 is no multiple of 4 \* heads=12"),
        ({"width": None, "patch": None}, r"width, patch not set; set all"),
        ({"arch": "eva02_base_patch16_clip_224"}, r"fixes width, depth, heads, patch; leave them out"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)


def test_unknown_architecture_names_the_nearest():
    with pytest.raises(InputError, match=r"no EVA model 'eva_giant_patch14_clip'; did you mean 'eva_giant_patch14_"):
        build("eva_clip", frames=1, arch="eva_giant_patch14_clip")
