"""A tokenizer of 50 made-up words, for the tiny models."""

from tiny_models import VOCAB
from transformers import PreTrainedTokenizerFast


def word_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Word w17 has id 17; <pad> 0, <s> 1, </s> 2; text in between is split at blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
