"""Weights: our own checkpoints to the bit, other projects' by name, and every refusal."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from trivium.datasets.registry import InputError
from trivium.modalities import build
from trivium.modalities.model import MultimodalModel
from trivium.modalities.weights import (
    load_matching,
    load_model,
    load_pretrained,
    read_state,
    resize_positions,
    save_model,
)

AUDIO = {
    "name": "beats", "length": 16, "mel_bins": 8, "width": 16, "layers": 2, "heads": 2, "feedforward": 16, "patch": 8,
    "patch_width": 8, "conv_kernel": 4, "conv_groups": 4, "buckets": 8, "max_distance": 8,
}  # fmt: skip
VIDEO = {"name": "eva_clip", "frames": 2, "size": 16, "width": 32, "depth": 2, "heads": 2, "patch": 8}
VOCAB = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "up", "down"])
TEXT = {"name": "bert", "max_tokens": 8, "width": 16, "layers": 2, "heads": 2, "feedforward": 16}


@pytest.fixture
def make(tmp_path_factory):
    """`make(seed, video=VIDEO, dim=5)`: a model of three tiny towers."""
    vocab = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    vocab.write_text(VOCAB)

    def make(seed: int, video: dict = VIDEO, dim: int = 5) -> MultimodalModel:
        torch.manual_seed(seed)
        towers = {"text": {**TEXT, "tokenizer": str(vocab)}, "video": video, "audio": AUDIO}
        return MultimodalModel({name: {"tower": tower} for name, tower in towers.items()}, dim=dim).eval()

    return make


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in a.state_dict().items())


# Our own


def test_save_and_load_to_the_bit(make, tmp_path):
    model = make(0)
    save_model(tmp_path / "a" / "b", model.state_dict(), model.description())
    random_state = torch.get_rng_state()
    twin = load_model(tmp_path / "a" / "b")
    assert torch.equal(torch.get_rng_state(), random_state), "loading drew random numbers"
    assert equal(model, twin)
    assert not twin.training
    assert twin.description() == model.description()


def test_strided_and_shared_tensors_are_saved(make, tmp_path):
    model = make(0)
    state = dict(model.state_dict())
    key = "heads.text.weight"
    state[key] = state[key].T.contiguous().T
    flat = torch.cat([state["towers.audio.layer_norm.weight"], state["towers.audio.layer_norm.bias"]])
    state["towers.audio.layer_norm.weight"], state["towers.audio.layer_norm.bias"] = flat.chunk(2)
    assert not state[key].is_contiguous()
    save_model(tmp_path, state, model.description())
    assert equal(model, load_model(tmp_path))


def test_a_checkpoint_of_another_model(make, tmp_path):
    model = make(0)
    state = dict(model.state_dict())
    state["towers.depth.cls_token"] = state.pop("towers.video.trunk.cls_token")
    state["heads.text.weight"] = torch.ones(7, 16)
    save_model(tmp_path, state, model.description())
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    message = str(error.value)
    assert "\n" not in message
    for part in (
        str(tmp_path / "model.safetensors"), "missing: towers.video.trunk.cls_token", "init_from",
        "unexpected: towers.depth.cls_token", "heads.text.weight: [7, 16] in the file, [5, 16] in the model",
    ):  # fmt: skip
        assert part in message


def test_absent_or_damaged_files(make, tmp_path):
    with pytest.raises(InputError, match=r"model\.json does not exist"):
        load_model(tmp_path)
    model = make(0)
    save_model(tmp_path, model.state_dict(), model.description())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="no whole safetensors file"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors does not exist"):
        load_model(tmp_path)
    for text in ("{", "[1]", '{"modalities": 3, "dim": 5}', '{"dims": 5}'):
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(InputError, match=r"model\.json describes no model"):
            load_model(tmp_path)


# Other runs


@pytest.mark.parametrize("form", ["folder", "safetensors", "pt", "bin, module."])
def test_start_from_another_run(make, tmp_path, form):
    source, model = make(0), make(1)
    state = source.state_dict()
    save_model(tmp_path / "run", state, source.description())
    torch.save(state, tmp_path / "run.pt")
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "step": 3}, tmp_path / "run.bin")
    path = {"folder": "run", "safetensors": "run/model.safetensors", "pt": "run.pt"}.get(form, "run.bin")
    report = load_matching(model, tmp_path / path)
    assert equal(source, model)
    assert set(report.loaded) == set(state)
    assert (report.missing, report.unexpected, report.mismatched, report.resized, report.ignored) == ((), (), (), (), 0)


def test_what_does_not_match_is_reported_and_left_alone(make, tmp_path):
    source, model = make(0, dim=7), make(1)
    state = dict(source.state_dict())
    del state["towers.audio.layer_norm.bias"]
    state["towers.depth.cls_token"] = torch.ones(3)
    save_file(state, tmp_path / "other.safetensors")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_matching(model, tmp_path / "other.safetensors")
    heads = {f"heads.{name}.weight" for name in ("text", "video", "audio")}
    assert set(report.missing) == heads | {"towers.audio.layer_norm.bias"}
    assert report.unexpected == ("towers.depth.cls_token",)
    assert "heads.text.weight: [7, 16] in the file, [5, 16] in the model" in report.mismatched
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in report.missing else state[key]), key
    total = len(before)
    assert str(report).startswith(f"{tmp_path}/other.safetensors: {total - 4} of {total} tensors loaded; mismatched: ")


def test_nothing_in_common_is_refused(make, tmp_path):
    save_file({"backbone.weight": torch.ones(2)}, tmp_path / "resnet.safetensors")
    with pytest.raises(InputError, match=r"no weights for this model \(file: backbone.weight; model: towers\.text"):
        load_matching(make(0), tmp_path / "resnet.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.pt", r"gone\.pt does not exist"),
        ("/gone/run", r"/gone/run does not exist"),
        ("runs/a/checkpoints", r"runs/a/checkpoints does not exist"),
    ],
)
def test_paths_that_are_not_there_never_reach_the_hub(make, monkeypatch, name, message):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=message):
        load_matching(make(0), name)


def test_a_hub_repository_is_read_from_its_local_copy(make, monkeypatch, tmp_path):
    import huggingface_hub

    source, model = make(0), make(1)
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns))
        if "*.bin" in allow_patterns:
            torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    load_matching(model, "someone/model")
    assert equal(source, model)
    assert [name for name, _ in asked] == ["someone/model"] * 2  # safetensors first, .bin where there are none


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("a checkpoint ran code",))


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    torch.save({"model": {"weight": torch.ones(2)}, "extra": Payload()}, tmp_path / "evil.pt")
    (tmp_path / "raw.bin").write_bytes(pickle.dumps({"weight": Payload()}, protocol=2))
    torch.save({"weight": torch.ones(2), "extra": Payload()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("evil.pt", "raw.bin", "old.pt"):
        with pytest.raises(InputError, match=r"code inside a checkpoint is never run"):
            read_state(tmp_path / name)


def test_files_that_hold_something_else(tmp_path):
    (tmp_path / "noise.pt").write_bytes(b"not a checkpoint at all")
    with pytest.raises(InputError, match="does not read as tensors"):
        read_state(tmp_path / "noise.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(InputError, match="holds a list, not a state dict"):
        read_state(tmp_path / "list.pt")
    (tmp_path / "many").mkdir()
    for name in ("a.pt", "b.pt"):
        torch.save({"w": torch.ones(1)}, tmp_path / "many" / name)
    with pytest.raises(InputError, match=r"weight files there: a\.pt, b\.pt\); name the file itself"):
        read_state(tmp_path / "many")
    (tmp_path / "many" / "b.pt").unlink()
    assert list(read_state(tmp_path / "many")) == ["w"]


# Other projects


def vast_state(source: MultimodalModel) -> dict[str, torch.Tensor]:
    """The towers of `source` under the names of a VAST checkpoint, with the parts that only VAST has."""
    state = {"contra_temp": torch.tensor(0.07), "vision_encoder.text.ln_final.weight": torch.ones(4)}
    for key, value in source.towers["video"].trunk.state_dict().items():
        state[f"vision_encoder.visual.{key}"] = value
    state |= {"vision_encoder.visual.head.weight": torch.ones(3, 32), "vision_encoder.visual.head.bias": torch.ones(3)}
    for key, value in source.towers["audio"].state_dict().items():
        state[f"audio_encoder.{key}"] = value
    repeated = "audio_encoder.encoder.layers.{}.self_attn.relative_attention_bias.weight"
    state[repeated.format(1)] = state[repeated.format(0)].clone()
    for key, value in source.towers["text"].bert.state_dict().items():
        state[f"multimodal_encoder.bert.{key}"] = value
    layer = "multimodal_encoder.bert.encoder.layer.0.crossattention."
    state |= {layer + "self.query.weight": torch.ones(16, 16), layer + "output.LayerNorm.bias": torch.ones(16)}
    state["multimodal_encoder.bert.embeddings.position_ids"] = torch.arange(512)[None]
    state["multimodal_encoder.cls.predictions.bias"] = torch.ones(6)
    for letter, name in (("t", "text"), ("v", "video"), ("a", "audio"), ("s", "text")):
        state[f"contra_head_{letter}.linear.weight"] = source.heads[name].weight.detach() + (letter == "s")
    state["contra_head_va.weight"] = torch.ones(5, 48)
    return state


# EVA-01, the kind that VAST has: one block matrix for q, k, v, no norm inside; at tiny size only by hand.
def eva01(seed: int):
    from timm.models.eva import Eva

    torch.manual_seed(seed)
    tower = build(**VIDEO)
    tower.trunk = Eva(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, global_pool="")
    for p in tower.parameters():
        torch.nn.init.normal_(p)
    return tower


def test_a_vast_checkpoint_fills_all_towers_and_heads(make, tmp_path):
    source, model = make(0), make(1)
    source.towers["video"], model.towers["video"] = eva01(0), eva01(1)
    torch.save(vast_state(source), tmp_path / "model_step_204994.pt")
    report = load_matching(model, tmp_path / "model_step_204994.pt")
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())
    assert equal(source, model)
    assert report.ignored == 11


def test_a_vast_checkpoint_fills_one_tower(make, tmp_path):
    source = make(0)
    source.towers["video"] = eva01(0)
    torch.save(vast_state(source), tmp_path / "vast.pt")
    video, audio = eva01(1), build(**AUDIO)
    load_pretrained(video, str(tmp_path / "vast.pt"))
    load_pretrained(audio, str(tmp_path / "vast.pt"))
    assert equal(source.towers["video"], video)
    assert equal(source.towers["audio"], audio)


EVA02 = {"mlp.fc1_g.": "mlp.w1.", "mlp.fc1_x.": "mlp.w2.", "mlp.fc2.": "mlp.w3.", "mlp.norm.": "mlp.ffn_ln."}
EVA02 |= {"attn.norm.": "attn.inner_attn_ln.", "attn.q_proj.bias": "attn.q_bias", "attn.v_proj.bias": "attn.v_bias"}


@pytest.mark.parametrize(("prefix", "original"), [("visual.", True), ("visual.trunk.", False), ("", False)])
def test_eva02_clip_files(tmp_path, prefix, original):
    """EVA-CLIP's own names and those of timm and open_clip, which keep timm's behind a prefix."""
    torch.manual_seed(0)
    source = build(**VIDEO)
    state = {"logit_scale": torch.ones(1), "text.ln_final.weight": torch.ones(4)} if prefix else {}
    for key, value in source.trunk.state_dict().items():
        for ours, theirs in EVA02.items() if original else ():
            key = key.replace(ours, theirs)
        state[prefix + key] = value
    if original:
        state |= {"visual.rope.freqs_cos": torch.ones(4, 8), "visual.blocks.0.attn.rope.freqs_cos": torch.ones(4, 8)}
        assert "visual.blocks.1.attn.q_bias" in state and "visual.blocks.1.mlp.w3.weight" in state
    torch.save({"state_dict": state}, tmp_path / "eva.pt")
    torch.manual_seed(1)
    tower = build(**VIDEO, pretrained=str(tmp_path / "eva.pt"))
    assert equal(source, tower)


def test_positions_are_resized_to_the_grid(make, tmp_path):
    source, model = make(0), make(1, video={**VIDEO, "size": 32})
    save_model(tmp_path, source.state_dict(), source.description())
    report = load_matching(model, tmp_path)
    assert report.resized == ("towers.video.trunk.pos_embed",)
    assert report.missing == ()
    old, new = source.towers["video"].trunk.pos_embed, model.towers["video"].trunk.pos_embed
    torch.testing.assert_close(new, resample_abs_pos_embed(old, [4, 4]), rtol=0, atol=1e-6)


def test_resizing_keeps_what_any_grid_can_hold():
    constant = torch.ones(1, 1 + 16, 3) * torch.tensor([1.0, -2.0, 0.5])
    torch.testing.assert_close(resize_positions(constant, 1 + 49), torch.ones(1, 50, 1) * constant[0, 0])
    there = torch.arange(16.0).view(4, 4).flatten().view(1, 16, 1)
    positions = torch.cat([torch.zeros(1, 1, 1), there], dim=1)
    assert torch.equal(resize_positions(positions, 17), positions)
    finer = resize_positions(positions, 1 + 64)[0, 1:, 0].view(8, 8)
    assert (finer.diff(dim=1) > 0).all(), "the order of columns is lost"
    assert (finer.diff(dim=0) > 0).all(), "the order of rows is lost"
    assert resize_positions(positions, 1 + 15) is None
    assert resize_positions(positions[:, :16], 17) is None


def test_old_names_of_bert(make, tmp_path):
    """The first BERT conversions call the norms' parameters gamma and beta, and carry a pooler and heads."""
    source = make(0).towers["text"]
    state = {"cls.predictions.bias": torch.ones(6), "bert.pooler.dense.weight": torch.ones(16, 16)}
    for key, value in source.state_dict().items():
        state[key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = value
    assert "bert.embeddings.LayerNorm.gamma" in state
    (tmp_path / "bert").mkdir()
    torch.save(state, tmp_path / "bert" / "pytorch_model.bin")
    tower = make(1).towers["text"]
    load_pretrained(tower, str(tmp_path / "bert"))
    assert equal(source, tower)


def test_pretrained_must_fill_the_tower(make, tmp_path):
    save_file(build(**AUDIO).state_dict(), tmp_path / "two.safetensors")
    deeper, shallower = {**AUDIO, "layers": 3}, {**AUDIO, "layers": 1}
    with pytest.raises(InputError, match=r"do not fit the tower.*missing: encoder\.layers\.2"):
        build(**deeper, pretrained=str(tmp_path / "two.safetensors"))
    with pytest.raises(InputError, match=r"do not fit the tower.*unexpected: encoder\.layers\.1"):
        build(**shallower, pretrained=str(tmp_path / "two.safetensors"))
    with pytest.raises(InputError, match=r"mismatched: .*fc1\.weight: \[16, 16\] in the file, \[8, 16\] in the model"):
        build(**{**AUDIO, "feedforward": 8}, pretrained=str(tmp_path / "two.safetensors"))


def test_two_towers_of_a_kind_both_start_from_the_file(tmp_path):
    video = {"left": {"tower": VIDEO}, "right": {"tower": VIDEO}}
    torch.manual_seed(0)
    source = build(**VIDEO)
    save_file(source.trunk.state_dict(), tmp_path / "timm.safetensors")
    model = MultimodalModel(video, dim=5)
    report = load_matching(model, tmp_path / "timm.safetensors")
    assert equal(source, model.towers["left"]) and equal(source, model.towers["right"])
    assert report.missing == ("heads.left.weight", "heads.right.weight")


def test_what_is_written_is_plain(make, tmp_path):
    model = make(0)
    save_model(tmp_path, model.state_dict(), model.description())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    assert json.loads((tmp_path / "model.json").read_text()) == model.description()
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
