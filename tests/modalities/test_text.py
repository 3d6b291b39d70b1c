"""BERT: against transformers' own eager model, masks, and every way to name a tokenizer."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from tokenizers import Tokenizer

from trivium.datasets.registry import InputError
from trivium.modalities import build
from trivium.modalities.text import tokenizer_json

SENTENCE = "the digit 3 is moving up and down left right mov ##ing ."
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *SENTENCE.split()]
TINY = {"width": 16, "layers": 2, "heads": 2, "feedforward": 24, "max_tokens": 12, "dropout": 0.0}


@pytest.fixture
def vocab(tmp_path) -> str:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return str(tmp_path / "vocab.txt")


def tiny(vocab: str, **options):
    torch.manual_seed(0)
    return build("bert", **{"tokenizer": vocab, **TINY, **options})


def captions() -> dict[str, torch.Tensor]:
    """Two captions of 5 and 8 tokens, padded to 12."""
    ids = torch.zeros(2, 12, dtype=torch.int64)
    ids[0, :5] = torch.tensor([2, 4, 5, 6, 3])
    ids[1, :8] = torch.tensor([2, 4, 5, 6, 7, 8, 9, 3])
    return {"ids": ids, "mask": (ids > 0).long()}


def test_equals_the_eager_model_of_transformers(vocab):
    from transformers import BertConfig, BertModel

    tower = tiny(vocab).double().eval()
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        attn_implementation="eager",
    )  # fmt: skip
    reference = BertModel(config, add_pooling_layer=False).double().eval()
    reference.load_state_dict(tower.bert.state_dict())
    inputs = captions()
    expected = reference(input_ids=inputs["ids"], attention_mask=inputs["mask"]).last_hidden_state
    features = tower(**inputs)
    torch.testing.assert_close(features.pooled, expected[:, 0], rtol=0, atol=1e-12)
    assert features.tokens.shape == (2, 12, 16)
    assert tower.bert.config._attn_implementation == "sdpa"


def test_padding_does_not_reach_the_class_token(vocab):
    tower = tiny(vocab).double().eval()
    inputs = captions()
    expected = tower(**inputs).pooled
    noisy = torch.where(inputs["mask"].bool(), inputs["ids"], torch.tensor(11))
    torch.testing.assert_close(tower(noisy, inputs["mask"]).pooled, expected, rtol=0, atol=1e-12)
    cut = {key: value[:, :8] for key, value in inputs.items()}
    torch.testing.assert_close(tower(**cut).pooled, expected, rtol=0, atol=1e-12)
    moved = inputs["ids"].clone()
    moved[0, 3] = 11  # a real token does
    assert (tower(moved, inputs["mask"]).pooled - expected)[0].abs().max() > 1e-6


def test_a_clip_without_captions_is_finite(vocab):
    tower = tiny(vocab).train()
    inputs = {key: torch.zeros(3, 12, dtype=torch.int64) for key in ("ids", "mask")}
    pooled = tower(**inputs).pooled
    pooled.square().sum().backward()
    assert torch.isfinite(pooled).all()
    assert all(torch.isfinite(p.grad).all() for p in tower.parameters())
    assert inputs["mask"].sum() == 0, "the caller's mask was written to"


def test_gradient_checkpointing_changes_nothing(vocab):
    gradients = []
    for on in (False, True):
        tower = tiny(vocab, gradient_checkpointing=on, dropout=0.2).double().train()
        torch.manual_seed(7)
        tower(**captions()).pooled.pow(3).sum().backward()
        gradients.append([p.grad for p in tower.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-12, atol=1e-12)


def test_every_parameter_trains_and_has_a_dimension(vocab):
    tower = tiny(vocab).train()
    tower(**captions()).tokens.pow(3).sum().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None or p.dim() == 0] == []


def test_full_size_is_bert_base(tmp_path):
    words = WORDS + [f"w{i}" for i in range(30_522 - len(WORDS))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    with torch.device("meta"):
        tower = build("bert", tokenizer=str(tmp_path / "vocab.txt"))
    assert sum(p.numel() for p in tower.parameters()) == 109_482_240 - 590_592  # bert-base without its pooler


def test_word_pieces_of_a_vocab_file(vocab):
    tokenizer = Tokenizer.from_str(tokenizer_json(vocab))
    encoded = tokenizer.encode("The DIGIT 3 is moving, xyz")
    assert encoded.tokens == ["[CLS]", "the", "digit", "3", "is", "moving", "[UNK]", "[UNK]", "[SEP]"]
    assert tokenizer.encode("moving").tokens == ["[CLS]", "moving", "[SEP]"]
    assert tokenizer.encode("moving up").ids == [2, WORDS.index("moving"), WORDS.index("up"), 3]
    assert tokenizer.decode([2, 4, 14, 15, 3]) == "the moving"


def test_word_pieces_agree_with_transformers(vocab):
    from transformers import BertTokenizer

    theirs = BertTokenizer(vocab=vocab, do_lower_case=True)
    ours = Tokenizer.from_str(tokenizer_json(vocab))
    for text in ("The digit 3 is moving up and down.", "Moving!", "dígit  3\tleft\nright", "movup", ""):
        assert ours.encode(text).ids == theirs(text)["input_ids"], text


def test_all_ways_to_name_a_tokenizer_agree(vocab, tmp_path):
    text = tokenizer_json(vocab)
    assert tokenizer_json(text) == text
    assert tokenizer_json(str(tmp_path)) == text  # the folder holds vocab.txt
    other = Tokenizer.from_str(text)
    other.enable_truncation(5)
    other.enable_padding(length=5)
    (tmp_path / "tokenizer.json").write_text(other.to_str())
    assert tokenizer_json(str(tmp_path / "tokenizer.json")) == text  # truncation and padding are the spec's
    assert tokenizer_json(str(tmp_path)) == text


def test_options_rebuild_the_tower_without_the_file(vocab, tmp_path):
    tower = tiny(vocab)
    (tmp_path / "vocab.txt").unlink()
    twin = build("bert", **json.loads(json.dumps(tower.options)))
    twin.load_state_dict(tower.state_dict())
    assert torch.equal(twin.eval()(**captions()).pooled, tower.eval()(**captions()).pooled)
    assert twin.spec == tower.spec == pickle.loads(pickle.dumps(tower.spec))
    assert tower.spec.max_tokens == 12


def test_wrong_tokenizers(vocab, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"missing\.txt does not exist; give"):
        tokenizer_json(str(tmp_path / "missing.txt"))
    with pytest.raises(InputError, match="given JSON is no tokenizer"):
        tokenizer_json('{"a": 1}')
    (tmp_path / "lacking.txt").write_text("[PAD]\n[UNK]\nthe\n")
    with pytest.raises(InputError, match=r"lacks \[CLS\], \[SEP\]"):
        tokenizer_json(str(tmp_path / "lacking.txt"))
    (tmp_path / "twice.txt").write_text("\n".join([*WORDS, "the"]))
    with pytest.raises(InputError, match=r"lists 'the' twice"):
        tokenizer_json(str(tmp_path / "twice.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"neither tokenizer\.json nor vocab\.txt"):
        tokenizer_json(str(tmp_path / "empty"))


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"'bert-base-uncased' is neither a local path .* \(no network\); check"):
        tokenizer_json("bert-base-uncased")


def test_wrong_options(vocab):
    with pytest.raises(InputError, match="max_tokens=513 is outside 3 to 512"):
        tiny(vocab, max_tokens=513)
    with pytest.raises(InputError, match="width=16 is not a multiple of heads=3"):
        tiny(vocab, heads=3)
    with pytest.raises(InputError, match="needs the option 'tokenizer'"):
        build("bert", width=16)


def test_pretrained_folder_of_transformers(vocab, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    source = BertForMaskedLM(config)
    source.save_pretrained(tmp_path / "hf")
    tower = tiny(vocab, pretrained=str(tmp_path / "hf"))
    for key, value in source.bert.state_dict().items():
        if not key.startswith("pooler."):
            assert torch.equal(tower.bert.state_dict()[key], value), key
    assert "pretrained" not in tower.options
    with pytest.raises(InputError, match=r"num_attention_heads=2, but the tower has 4"):
        tiny(vocab, heads=4, pretrained=str(tmp_path / "hf"))
    with pytest.raises(InputError, match=r"do not fit the tower.*unexpected"):
        tiny(vocab, layers=1, pretrained=str(tmp_path / "hf"))
