"""A tiny random classifier in Detoxify's checkpoint form."""

from pathlib import Path

import torch

LABELS = ["toxic", "identity_hate"]
READABLE = ["you", "are", "a", "good", "friend", "and", "this", "is", "the", "day", "that", "we", "go", "to", "house"]
WORDS = [*READABLE, "bad", "idiot", "nice", "hate"]


def judge_folder(path: Path) -> Path:
    """Config, tokenizer and checkpoint of a random BERT with two labels."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12, num_labels=2,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    config.save_pretrained(path)
    save(path / "judge.ckpt", model.state_dict())
    return path


def save(path: Path, state: dict[str, torch.Tensor]) -> None:
    """A checkpoint that holds ``state``."""
    args = {"model_type": str(path.parent), "model_name": "BertForSequenceClassification", "num_classes": 2}
    args["tokenizer_name"] = "PreTrainedTokenizerFast"
    config = {"dataset": {"args": {"classes": LABELS}}, "arch": {"args": args}}
    torch.save({"config": config, "state_dict": state}, path)
