"""BERT (Devlin et al. 2019) over WordPiece tokens, and the ways to name a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..datasets.registry import InputError
from . import Features, TokenSpec, register
from .weights import bert_names, load_pretrained, locate

POSITIONS = 512  # of every released BERT
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@register("bert")
class BertTower(nn.Module):
    """BERT; the defaults are the sizes of bert-base. Pooled features are those of the first token, [CLS].

    Args:
        tokenizer: path of a `vocab.txt` (one WordPiece a line, the line number its id; captions are lower-cased), of a
            `tokenizer.json`, or of a folder that holds one; the name of a Hugging Face repository; or the JSON text of
            a `tokenizers.Tokenizer` itself.
        max_tokens: tokens of a caption, [CLS] and [SEP] included; at most 512.
        width, layers, heads, feedforward: sizes of the transformer.
        dropout: on embeddings, residual branches and attention probabilities.
        gradient_checkpointing: recompute layers in the backward pass.
        pretrained: weights: a folder, a file, or the name of a Hugging Face repository; VAST and GRAM files do too.
    """

    translate = staticmethod(bert_names)

    def __init__(
        self,
        *,
        tokenizer: str,
        max_tokens: int = 40,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        feedforward: int = 3072,
        dropout: float = 0.1,
        gradient_checkpointing: bool = False,
        pretrained: str | None = None,
    ) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        if not 3 <= max_tokens <= POSITIONS:
            raise InputError(
                f"bert: max_tokens={max_tokens} is outside 3 to {POSITIONS}; set it to the longest caption"
            )
        if width % heads:
            raise InputError(f"bert: width={width} is not a multiple of heads={heads}; change one of them")
        text = tokenizer_json(tokenizer)
        vocabulary, padding = _vocabulary(text)
        self.options: dict[str, Any] = {
            "tokenizer": text, "max_tokens": max_tokens, "width": width, "layers": layers, "heads": heads,
            "feedforward": feedforward, "dropout": dropout, "gradient_checkpointing": gradient_checkpointing,
        }  # fmt: skip
        self.width = width
        self.spec = TokenSpec(tokenizer=text, max_tokens=max_tokens)
        config = BertConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=feedforward, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
            max_position_embeddings=POSITIONS, pad_token_id=padding, attn_implementation="sdpa",
        )  # fmt: skip
        self.bert = BertModel(config, add_pooling_layer=False)
        if gradient_checkpointing:
            self.bert.activation_checkpointing_enable({"use_reentrant": False})
        if pretrained is not None:
            folder = locate(pretrained)
            _check_config(folder, config)
            load_pretrained(self, str(folder))

    def forward(self, ids: Tensor, mask: Tensor) -> Features:
        """ids and mask int64 (n, L) -> pooled (n, d), tokens (n, L, d).

        A row without any token (a clip without captions) attends to its first position alone, so that it is finite.
        """
        mask = mask.clone()
        mask[:, 0] = 1
        tokens = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        return Features(pooled=tokens[:, 0], tokens=tokens)


def tokenizer_json(source: str) -> str:
    """The JSON text of the tokenizer that `source` names (see `BertTower`), truncation and padding taken out.

    Raises InputError when there is none, or it lacks one of [PAD], [UNK], [CLS], [SEP].
    """
    if source.startswith("{"):
        name, tokenizer = "the given JSON", _parsed(source, "the given JSON")
    else:
        path = locate(source)
        name = str(path)
        if path.is_dir():
            path = _tokenizer_file(path)
        tokenizer = _wordpiece(path) if path.suffix == ".txt" else _parsed(path.read_text(encoding="utf-8"), name)
    lacking = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    if lacking:
        raise InputError(f"the tokenizer of {name} lacks {', '.join(lacking)}; BERT needs {', '.join(SPECIAL_TOKENS)}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.to_str()


def _tokenizer_file(folder: Path) -> Path:
    for name in ("tokenizer.json", "vocab.txt"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder} holds neither tokenizer.json nor vocab.txt; put one there, or name the file itself")


def _parsed(text: str, name: str) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises the bare class
        raise InputError(f"{name} is no tokenizer ({error}); give the JSON of a tokenizers.Tokenizer") from None


def _wordpiece(vocab: Path) -> Any:
    """The lower-casing BERT tokenizer over a `vocab.txt`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = vocab.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # splitlines would cut at U+2028 too
    ids = {word: i for i, word in enumerate(words)}
    repeated = [word for i, word in enumerate(words) if ids[word] != i]
    if repeated:
        raise InputError(f"{vocab} lists {repeated[0]!r} twice; a line is a token and its number the id: remove one")
    lacking = [token for token in SPECIAL_TOKENS if token not in ids]
    if lacking:
        raise InputError(f"{vocab} lacks {', '.join(lacking)}; BERT needs {', '.join(SPECIAL_TOKENS)}, one a line")
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return tokenizer


def _vocabulary(text: str) -> tuple[int, int]:
    """Rows of the word embedding (the highest id + 1) and the id of [PAD]."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1, tokenizer.token_to_id("[PAD]")


def _check_config(folder: Path, config: Any) -> None:
    """Refuse a pretrained model whose shapes may agree but whose arithmetic does not."""
    file = folder / "config.json"
    if not file.is_file():
        return
    theirs = json.loads(file.read_text(encoding="utf-8"))
    for key in ("num_attention_heads", "hidden_act", "layer_norm_eps"):
        if key in theirs and theirs[key] != getattr(config, key):
            ours = getattr(config, key)
            raise InputError(f"{file}: {key}={theirs[key]!r}, but the tower has {ours!r}; set it alike or take another")
