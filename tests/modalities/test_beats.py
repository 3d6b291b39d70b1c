"""BEATs: numbers of the public implementation, positions, clips, dropouts."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from trivium.datasets.registry import InputError
from trivium.modalities import build
from trivium.modalities.beats import BeatsTower, relative_buckets
from trivium.modalities.weights import load_matching

TINY = {
    "length": 24, "mel_bins": 8, "width": 16, "layers": 3, "heads": 2, "feedforward": 24, "patch": 4,
    "patch_width": 12, "conv_kernel": 6, "conv_groups": 4, "buckets": 8, "max_distance": 6,
}  # fmt: skip

# Made once with the public BEATs code (microsoft/unilm, beats/BEATs.py) in float64, with the sizes above (deep_norm,
# relative_position_embedding and gru_rel_pos on), parameters by `fill` and the input by `signal`: every eighth of the
# 192 output numbers of sample 0, and the mean over tokens of sample 1. `buckets` and `max_distance` are small enough
# for all branches of the bucketing to occur among the 12 tokens.
TOKENS_OF_SAMPLE_0 = [
    -1.33761952, -0.25140666, -1.92564731, 1.22103877, 0.42469475, -1.39888501, -1.69523245, 0.73823416,
    1.60213768, -0.24331824, -1.20612263, -0.21881343, 1.98210837, 0.68274402, 0.91338834, -1.31191911,
    1.40527527, 1.61202364, 1.47499820, -0.75538508, -1.07772182, 2.86611077, 1.61551370, 0.75302152,
]  # fmt: skip
POOLED_OF_SAMPLE_1 = [
    -0.96184007, 0.91439486, 0.05049967, -0.70359681, -0.17258581, -0.31160104, 0.25046949, 1.38637290,
    0.68224873, -0.55888677, 0.79209892, -0.17280002, -0.56236084, -0.04001472, -0.19425999, -0.18566185,
]  # fmt: skip


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Parameters as a function of their rank among the sorted names alone."""
    for rank, (name, parameter) in enumerate(sorted(module.named_parameters())):
        values = 0.1 * torch.sin(0.7 * torch.arange(parameter.numel(), dtype=torch.float64) + rank)
        around_one = name.endswith(("norm.weight", "weight_g", "grep_a"))
        parameter.copy_((values + around_one).view_as(parameter))


def signal(n: int, length: int, mel_bins: int) -> Tensor:
    i = torch.arange(n * length * mel_bins, dtype=torch.float64)
    return torch.sin(0.37 * i + 0.01 * i.sqrt()).view(n, 1, length, mel_bins)


def tiny(**options) -> BeatsTower:
    torch.manual_seed(0)
    return build("beats", **{**TINY, "dropout": 0.0, "attention_dropout": 0.0, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_of_the_public_implementation(dtype):
    tower = tiny().to(dtype).eval()
    fill(tower)
    features = tower(signal(2, 24, 8).to(dtype))
    assert features.tokens.shape == (2, 12, 16)
    expected = torch.tensor(TOKENS_OF_SAMPLE_0, dtype=dtype)
    torch.testing.assert_close(features.tokens[0].flatten()[::8], expected, rtol=0, atol=1e-5)
    expected = torch.tensor(POOLED_OF_SAMPLE_1, dtype=dtype)
    torch.testing.assert_close(features.pooled[1], expected, rtol=0, atol=1e-5)


def test_the_fixture_notices_every_parameter():
    """Each tensor of the tower, moved a little, moves the output: none is dead, so the fixture guards them all.

    The key bias is the exception that proves attention is a softmax: it shifts all logits of a query alike.
    """
    tower = tiny().double().eval()
    fill(tower)
    tower(signal(2, 24, 8)).tokens.pow(3).sum().backward()
    dead = [name for name, p in tower.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9]
    assert dead == [f"encoder.layers.{i}.self_attn.k_proj.bias" for i in range(3)]


def test_full_size_has_the_published_parameters():
    with torch.device("meta"):
        tower = build("beats")
    assert sum(p.numel() for p in tower.parameters()) == 90_311_792
    assert all(p.dim() > 0 for p in tower.parameters())


def test_names_and_shapes_of_the_released_checkpoints():
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in build("beats").state_dict().items()}
    d, f = 768, 3072
    expected = {
        "patch_embedding.weight": (512, 1, 16, 16),
        "layer_norm.weight": (512,), "layer_norm.bias": (512,),
        "post_extract_proj.weight": (d, 512), "post_extract_proj.bias": (d,),
        "encoder.pos_conv.0.bias": (d,), "encoder.pos_conv.0.weight_g": (1, 1, 128),
        "encoder.pos_conv.0.weight_v": (d, 48, 128),
        "encoder.layer_norm.weight": (d,), "encoder.layer_norm.bias": (d,),
        "encoder.layers.0.self_attn.relative_attention_bias.weight": (320, 12),
    }  # fmt: skip
    for i in range(12):
        layer = f"encoder.layers.{i}."
        expected[layer + "self_attn.grep_a"] = (1, 12, 1, 1)
        expected |= {layer + "self_attn.grep_linear.weight": (8, 64), layer + "self_attn.grep_linear.bias": (8,)}
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            expected |= {f"{layer}self_attn.{part}.weight": (d, d), f"{layer}self_attn.{part}.bias": (d,)}
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            expected |= {f"{layer}{norm}.weight": (d,), f"{layer}{norm}.bias": (d,)}
        expected |= {layer + "fc1.weight": (f, d), layer + "fc1.bias": (f,)}
        expected |= {layer + "fc2.weight": (d, f), layer + "fc2.bias": (d,)}
    assert shapes == expected


def naive_bucket(distance: int, buckets: int, max_distance: int) -> int:
    """T5's bidirectional buckets, one number at a time."""
    half = buckets // 2
    size, exact = abs(distance), half // 2
    bucket = size
    if size >= exact:
        fraction = math.log(size / exact) / math.log(max_distance / exact)
        bucket = min(exact + int(fraction * (half - exact) + 1e-6), half - 1)
    return bucket + (half if distance > 0 else 0)


@pytest.mark.parametrize(("buckets", "max_distance", "tokens"), [(320, 800, 1200), (8, 6, 12), (32, 128, 300)])
def test_buckets_by_a_loop(buckets, max_distance, tokens):
    expected = [naive_bucket(distance, buckets, max_distance) for distance in range(1 - tokens, tokens)]
    assert relative_buckets(tokens, buckets, max_distance).tolist() == expected


def test_position_bias_depends_on_the_distance_alone():
    encoder = tiny().encoder
    table = encoder.layers[0].self_attn.relative_attention_bias.weight
    bias = encoder.position_bias(12)
    for i in range(12):
        for j in range(12):
            torch.testing.assert_close(bias[:, i, j], table[naive_bucket(j - i, 8, 6)], rtol=0, atol=0)


def test_buckets_first_asked_for_in_inference_mode_still_train():
    relative_buckets.cache_clear()
    tower = tiny()
    with torch.inference_mode():
        tower(signal(1, 24, 8))
    tower(signal(1, 24, 8)).pooled.sum().backward()


def test_clips_are_encoded_apart_and_averaged():
    tower = tiny(clips=3).eval()
    fbank = signal(6, 24, 8).view(2, 3, 24, 8).float()
    features = tower(fbank)
    one_by_one = torch.stack([tower(fbank[:, c : c + 1]).pooled for c in range(3)]).mean(dim=0)
    torch.testing.assert_close(features.pooled, one_by_one)
    assert features.tokens.shape == (2, 36, 16)
    torch.testing.assert_close(features.tokens.mean(dim=1), features.pooled)


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for on in (False, True):
        tower = tiny(gradient_checkpointing=on, dropout=0.2, attention_dropout=0.2).double().train()
        torch.manual_seed(7)
        tower(signal(2, 24, 8)).pooled.pow(3).sum().backward()
        gradients.append([p.grad for p in tower.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-12, atol=1e-12)


def test_dropouts_rest_in_evaluation_and_follow_the_seed_in_training():
    tower = tiny(dropout=0.3, attention_dropout=0.3, layerdrop=0.5)
    x = signal(4, 24, 8).float()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(tower.train()(x).pooled)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(tower.eval()(x).pooled, tower(x).pooled)


def test_layerdrop_skips_layers_by_sample():
    """One layer, chance 1/2: a sample's tokens are those after the layer or those before it, nothing between."""
    tower = tiny(layers=1, layerdrop=0.5)
    x = signal(16, 24, 8).float()
    after = tower.eval()(x).tokens
    before = []
    hook = tower.encoder.layers[0].register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    mixed = tower.train()(x).tokens
    hook.remove()
    skipped = [torch.equal(mixed[i], before[0][i]) for i in range(16)]
    kept = [torch.allclose(mixed[i], after[i], atol=1e-6) for i in range(16)]
    assert all(a != b for a, b in zip(skipped, kept, strict=True))
    assert 0 < sum(skipped) < 16


def test_silence_is_finite_forwards_and_backwards():
    tower = tiny().train()
    tower(torch.zeros(2, 1, 24, 8)).pooled.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in tower.parameters())


def test_spec_and_options_travel():
    tower = tiny(clips=2)
    assert pickle.loads(pickle.dumps(tower.spec)) == tower.spec
    assert (tower.spec.length, tower.spec.clips, tower.spec.mel_bins) == (24, 2, 8)
    twin = build("beats", **tower.options)
    assert twin.options == tower.options
    twin.load_state_dict(tower.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 26}, r"length=26 is not a multiple of patch=4; set length to 24 or 28"),
        ({"mel_bins": 3}, r"mel_bins=3 .* set mel_bins to 4"),
        ({"heads": 3}, r"width=16 is not a multiple of heads=3"),
        ({"conv_groups": 5}, r"width=16 is not a multiple of conv_groups=5"),
        ({"lenght": 24}, r"no option 'lenght'; did you mean 'length'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        tiny(**options)


def test_a_release_loads_by_name(tmp_path):
    """A release is {"cfg", "model"}, repeats the relative bias under every layer, and may carry a predictor."""
    source = tiny()
    state = source.state_dict()
    for i in (1, 2):
        key = "encoder.layers.{}.self_attn.relative_attention_bias.weight"
        state[key.format(i)] = state[key.format(0)]
    state |= {"predictor.weight": torch.ones(527, 16), "predictor.bias": torch.ones(527)}
    torch.save({"cfg": {"encoder_layers": 3, "deep_norm": True}, "model": state}, tmp_path / "BEATs_tiny.pt")
    tower = build("beats", **TINY, pretrained=str(tmp_path / "BEATs_tiny.pt"))
    for key, value in source.state_dict().items():
        assert torch.equal(tower.state_dict()[key], value)
    assert "pretrained" not in tower.options
    report = load_matching(tiny(), tmp_path / "BEATs_tiny.pt")
    assert (report.missing, report.unexpected, report.ignored) == ((), (), 4)
