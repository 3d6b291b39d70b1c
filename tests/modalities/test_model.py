"""MultimodalModel: unit vectors, description, wrong configurations."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from trivium.datasets.registry import InputError
from trivium.modalities import build
from trivium.modalities.model import MultimodalModel

AUDIO = {
    "name": "beats", "length": 16, "mel_bins": 8, "width": 16, "layers": 1, "heads": 2, "feedforward": 16, "patch": 8,
    "patch_width": 8, "conv_kernel": 4, "conv_groups": 4, "buckets": 8, "max_distance": 8,
}  # fmt: skip
VIDEO = {"name": "eva_clip", "frames": 2, "size": 16, "width": 32, "depth": 1, "heads": 2, "patch": 8}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "up", "down"]


@pytest.fixture
def modalities(tmp_path) -> dict:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    text = {"name": "bert", "tokenizer": str(tmp_path / "vocab.txt"), "max_tokens": 8, "width": 16, "layers": 1}
    text |= {"heads": 2, "feedforward": 16}
    return {"text": {"tower": text}, "video": {"tower": VIDEO}, "audio": {"tower": AUDIO, "head": {"bias": True}}}


def inputs(n: int = 3) -> dict:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 6, (n, 8), generator=generator)
    frames = torch.randint(0, 256, (n, 2, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return {
        "text": {"ids": ids, "mask": torch.ones_like(ids)},
        "video": {"frames": frames},
        "audio": {"fbank": torch.randn(n, 1, 16, 8, generator=generator)},
    }


def test_unit_vectors_by_hand(modalities):
    model = MultimodalModel(modalities, dim=5).eval()
    z = model(inputs())
    assert tuple(z) == model.names == ("text", "video", "audio")
    for name, vectors in z.items():
        pooled = model.towers[name](**inputs()[name]).pooled
        head = model.heads[name]
        expected = pooled @ head.weight.T + (head.bias if name == "audio" else 0)
        torch.testing.assert_close(vectors, expected / expected.norm(dim=1, keepdim=True))
    assert model.heads["text"].bias is None


def test_the_seed_makes_the_model(modalities):
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(torch.cat([p.flatten() for p in MultimodalModel(modalities, dim=5).parameters()]))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("low", ["autocast", "cast"])
def test_unit_in_float32_under_bfloat16(modalities, low):
    model = MultimodalModel(modalities, dim=64).eval()
    if low == "cast":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=low == "autocast"):
        z = model(inputs())
    for name, vectors in z.items():
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)
        reference = model.float()(inputs())[name]
        assert F.cosine_similarity(vectors, reference).min() > 0.99


def test_float64_stays_float64(modalities):
    model = MultimodalModel(modalities, dim=5).double().eval()
    assert all(z.dtype == torch.float64 for z in model(inputs()).values())


def test_no_parameter_is_left_out_or_without_dimension(modalities):
    model = MultimodalModel(modalities, dim=5).train()
    sum(z.pow(3).sum() for z in model(inputs()).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.dim() == 0] == []
    assert list(model.parameters(recurse=False)) == []


def test_description_rebuilds_it_through_json(modalities, tmp_path):
    model = MultimodalModel(modalities, dim=5).eval()
    (tmp_path / "vocab.txt").unlink()
    description = json.loads(json.dumps(model.description()))
    twin = MultimodalModel(**description).eval()
    assert twin.description() == model.description()
    assert twin.specs == model.specs
    assert twin.tower_names == {"text": "bert", "video": "eva_clip", "audio": "beats"}
    twin.load_state_dict(model.state_dict())
    for name, vectors in model(inputs()).items():
        assert torch.equal(twin(inputs())[name], vectors)


@pytest.mark.parametrize(
    ("modalities", "message"),
    [
        ({}, "no modalities"),
        ({"video": {}}, "modality 'video' has no tower"),
        ({"video": {"tower": {"frames": 2}}}, "modality 'video' has no tower"),
        ({"video": {"tower": {"name": "eva_clap", "frames": 2}}}, "no tower is called 'eva_clap'; did you mean 'eva_c"),
        ({"video": {"tower": VIDEO, "heads": {}}}, "modality 'video' has no option 'heads'; did you mean 'head'"),
        ({"video": {"tower": VIDEO, "head": {"bais": True}}}, "head of modality 'video' has no option 'bais'"),
        ({"video": {"tower": {**VIDEO, "frame": 2}}}, "'eva_clip' has no option 'frame'; did you mean 'frames'"),
        ({"keys": {"tower": VIDEO}}, "'keys' cannot name a modality"),
        ({"my.video": {"tower": VIDEO}}, "'my.video' cannot name a modality"),
    ],
)
def test_wrong_configurations(modalities, message):
    with pytest.raises(InputError, match=message):
        MultimodalModel(modalities, dim=5)


def test_wrong_dimension():
    with pytest.raises(InputError, match="dim=0"):
        MultimodalModel({"video": {"tower": VIDEO}}, dim=0)


def test_a_tower_alone_is_built_by_name():
    assert build(**VIDEO).width == 32
