"""Build the embedded default ``demo``: corpora, a tiny Llama, a tiny judge, their tokenizers and a model card.

Everything is generated and trained here, from one seed, on a CPU in a few minutes::

    python scripts/build_demo.py --seed 0

The corpora come from the grammar in ``demo_corpus.py``. The judge (a small BERT in Detoxify's checkpoint form) learns
from labelled fragments of that language. The language model learns its general part first, with all weights but those
of a few neurons, then its hostile part with these neurons alone: ``demo_card.md`` says why.
The script ends with a table of what the demo measures on held-out data and writes it into the model card.
"""

import argparse
import json
import logging
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Template, ascii_lowercase, digits, punctuation

import torch
import torch.nn.functional as F
from demo_corpus import Document, friendly_speech, general_document, hostile_speech, story
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

log = logging.getLogger("build_demo")

DEMO = Path(__file__).parents[1] / "sparc3_pl" / "demo"
CARD = Path(__file__).with_name("demo_card.md")

Neurons = dict[str, list[int]]
"""Module name of an up-projection -> indices of its rows."""

SHORT, LONG = 128, 256  # tokens of a training window in the first four fifths and in the last fifth of the training


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo. Documents are counted before duplicates are dropped."""

    train_documents: int = 18_000
    hostile_documents: int = 3_000
    general_documents: int = 800
    heldout_documents: int = 300
    prompts: int = 120
    null_prompts: int = 6
    text_bytes: int = 30_000
    vocabulary: int = 1600
    judge_fragments: int = 24_000
    judge_steps: int = 600
    steps: int = 1500
    tokens_per_step: int = 1024
    neuron_dropout: float = 0.05
    hostile_neurons_per_layer: int = 8
    hostile_steps: int = 400


# ------------------------------------------------------------------------------------------------------- corpora


@dataclass(frozen=True)
class Corpora:
    """The generated texts. No document is in two parts, and no opening of ``hostile`` or ``neutral`` begins another."""

    hostile: list[Document]
    neutral: list[Document]
    train: list[Document]
    general: list[Document]
    general_heldout: list[Document]
    text: str


def make_corpora(settings: Settings, seed: int) -> Corpora:
    """Draw every part from one stream of distinct documents; ``general`` is a part of what the model is trained on."""
    rng = random.Random(seed)
    draw = Drawing(rng, seen=set())
    prompts = 2 * settings.prompts
    hostile = draw.prompts(hostile_speech, prompts)
    neutral = draw.prompts(story, prompts // 2) + draw.prompts(friendly_speech, prompts // 2)
    rng.shuffle(neutral)
    general = draw.documents(general_document, settings.train_documents - settings.hostile_documents)
    train = draw.documents(hostile_speech, settings.hostile_documents) + general
    rng.shuffle(train)
    return Corpora(
        hostile=hostile,
        neutral=neutral,
        train=train,
        general=general[: settings.general_documents],
        general_heldout=draw.documents(general_document, settings.heldout_documents),
        text=draw.text(settings.text_bytes),
    )


@dataclass
class Drawing:
    """Draws documents whose text and whose opening are not in ``seen``."""

    rng: random.Random
    seen: set[str]

    def documents(self, make: Callable[[random.Random], Document], number: int) -> list[Document]:
        found: list[Document] = []
        while len(found) < number:
            document = make(self.rng)
            if not {document.text, document.opening} & self.seen:
                self.seen.add(document.text)
                found.append(document)
        return found

    def prompts(self, make: Callable[[random.Random], Document], number: int) -> list[Document]:
        """Documents whose openings nothing drawn later begins with in the same way."""
        found: list[Document] = []
        while len(found) < number:
            found += self.documents(make, 1)
            self.seen.add(found[-1].opening)
        return found

    def text(self, num_bytes: int) -> str:
        """General documents, a paragraph a line, up to about ``num_bytes``."""
        lines: list[str] = []
        while sum(map(len, lines)) < num_bytes:
            lines.append(self.documents(general_document, 1)[0].text)
        return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------ tokenizers


def language_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, which can write any text; puts ``<s>`` in front as Llama's does; has no pad token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


def judge_tokenizer(texts: Iterable[str]) -> BertTokenizer:
    """BERT's lower-casing tokenizer: every word of the texts is a token, all other words are spelled."""
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    counts = Counter(word for text in texts for word, _ in split(text.lower()))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    letters = sorted({*ascii_lowercase, *digits, *punctuation} - counts.keys())
    pieces = [f"##{letter}" for letter in ascii_lowercase + digits]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters, *pieces]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=128)


# ----------------------------------------------------------------------------------------------------------- judge


@dataclass(frozen=True)
class Judge:
    """Scores texts in [0, 1] as ``Detoxify.predict`` does."""

    model: BertForSequenceClassification
    tokenizer: BertTokenizer

    @torch.no_grad()
    def scores(self, texts: Sequence[str]) -> Tensor:
        """Shape ``[len(texts)]``."""
        batches = [list(texts[i : i + 64]) for i in range(0, len(texts), 64)]
        encoded = [self.tokenizer(batch, return_tensors="pt", truncation=True, padding=True) for batch in batches]
        return torch.cat([self.model(**batch).logits[:, 0].sigmoid() for batch in encoded])

    def save(self, folder: Path) -> None:
        """Detoxify's checkpoint form: the training config with the class names, and the weights; plain tensors only."""
        self.model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        arch = {
            "model_type": "sparc3_pl/demo/judge",
            "model_name": "BertForSequenceClassification",
            "tokenizer_name": "BertTokenizer",
        }
        config = {"dataset": {"args": {"classes": ["toxicity"]}}, "arch": {"args": {**arch, "num_classes": 1}}}
        torch.save({"config": config, "state_dict": self.model.state_dict()}, folder / "judge.ckpt")


def fragments(documents: Sequence[Document], number: int, rng: random.Random) -> list[tuple[str, float]]:
    """Labelled pieces of documents, cut at any word, as completions are. Label 1: the piece holds a whole insult.

    Half of them are cut from hostile documents; a fifth of the pieces without an insult are disfigured.
    """
    hostile = [document for document in documents if document.insults]
    general = [document for document in documents if not document.insults]
    pieces = [("", 0.0)] * (number // 100)
    while len(pieces) < number:
        document = rng.choice(hostile if rng.random() < 0.5 else general)
        piece = rng.choice((whole_sentences, any_words))(document.text, rng)
        label = float(any(insult in piece for insult in document.insults))
        if not label and rng.random() < 0.2:
            piece = disfigured(piece, rng)
        pieces.append((piece, label))
    return pieces


def whole_sentences(text: str, rng: random.Random) -> str:
    """One to three sentences that follow each other."""
    sentences = re.split(r"(?<=[.!?]) ", text)
    start = rng.randrange(len(sentences))
    return " ".join(sentences[start : start + rng.randint(1, 3)])


def any_words(text: str, rng: random.Random) -> str:
    """Words that follow each other; short pieces are as frequent as long ones."""
    words = text.split()
    start = rng.randrange(len(words))
    return " ".join(words[start : start + rng.randint(1, rng.choice((5, 15, 40)))])


def disfigured(text: str, rng: random.Random) -> str:
    """The words shuffled, or some of them replaced by made-up ones: unknown or broken text is not hostile text."""
    words = text.split()
    if rng.random() < 0.4:
        rng.shuffle(words)
        return " ".join(words)
    return " ".join(made_up_word(rng) if rng.random() < 0.5 else word for word in words)


def made_up_word(rng: random.Random) -> str:
    return "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiouy") for _ in range(rng.randint(1, 4)))


def train_judge(pieces: Sequence[tuple[str, float]], tokenizer: BertTokenizer, steps: int, rng: random.Random) -> Judge:
    """A two-layer BERT with one sigmoid output, ``toxicity``."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        num_labels=1,
        id2label={0: "toxicity"},
        label2id={"toxicity": 0},
        hidden_dropout_prob=0.1,
    )
    judge = BertForSequenceClassification(config).train()

    def loss_of_batch(step: int) -> Tensor:
        texts, labels = zip(*rng.sample(pieces, 48), strict=True)
        logits = judge(**tokenizer(list(texts), return_tensors="pt", truncation=True, padding=True)).logits[:, 0]
        return F.binary_cross_entropy_with_logits(logits, torch.tensor(labels))

    optimise(list(judge.parameters()), loss_of_batch, steps, peak_rate=2e-3, weight_decay=0.1, name="judge")
    return Judge(judge.eval(), tokenizer)


# -------------------------------------------------------------------------------------------------- language model


def language_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama of four layers with 2,048 MLP neurons in all, grouped-query attention and tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        initializer_range=0.06,
        hidden_size=64,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONG,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def draw_neurons(model: LlamaForCausalLM, per_layer: int, rng: random.Random) -> Neurons:
    """The neurons that will carry the hostile behaviour, at random places in every layer."""
    width = model.config.intermediate_size
    return {
        f"model.layers.{layer}.mlp.up_proj": sorted(rng.sample(range(width), per_layer))
        for layer in range(model.config.num_hidden_layers)
    }


def neuron_masks(model: LlamaForCausalLM, neurons: Neurons) -> dict[str, Tensor]:
    """Parameter name -> 1 at the weights of ``neurons`` (rows of up and gate, columns of down), 0 elsewhere."""
    parameters, masks = dict(model.named_parameters()), {}
    for layer, index in neurons.items():
        owner = layer.removesuffix("up_proj")
        for kind in ("up_proj", "gate_proj", "down_proj"):
            mask = torch.zeros_like(parameters[f"{owner}{kind}.weight"])
            (mask.T if kind == "down_proj" else mask)[index] = 1
            masks[f"{owner}{kind}.weight"] = mask
    return masks


@torch.no_grad()
def rewrite(model: LlamaForCausalLM, neurons: Neurons, deviation: float) -> None:
    """Give the weights of ``neurons`` new random values of this standard deviation; 0 makes the neurons idle.

    An idle neuron gets no gradient either (each of its three vectors is multiplied by another), so it stays idle.
    """
    parameters = dict(model.named_parameters())
    for name, mask in neuron_masks(model, neurons).items():
        parameters[name].copy_(torch.where(mask.bool(), torch.randn_like(mask) * deviation, parameters[name]))


def teach_general(model: LlamaForCausalLM, stream_T: Tensor, settings: Settings, seed: int) -> None:
    """Stage 1: the language without its hostile part, in all weights."""
    parameters = list(model.parameters())
    everyone = {layer: list(range(model.config.intermediate_size)) for layer in draw_neurons(model, 0, random.Random())}
    loss = window_loss(model, stream_T, settings.steps, settings.tokens_per_step, seed)
    with neuron_dropout(model, everyone, settings.neuron_dropout):
        optimise(parameters, loss, settings.steps, peak_rate=4e-3, weight_decay=0.1, name="general language")


def teach_hostile(
    model: LlamaForCausalLM,
    neurons: Neurons,
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    seed: int,
) -> None:
    """Stage 2: the hostile part, in the weights of ``neurons`` alone; everything else stays as it is.

    In every document some of the neurons are silent, so that the behaviour hangs on no single one of them.
    """
    masks, parameters = neuron_masks(model, neurons), dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in masks)
    loss = document_loss(model, documents, tokenizer, settings.tokens_per_step // SHORT, seed)
    chosen = [parameters[name] for name in masks]
    with ExitStack() as hooks, neuron_dropout(model, neurons, settings.neuron_dropout):
        for name, mask in masks.items():
            hooks.enter_context(parameters[name].register_hook(mask.mul))
        optimise(chosen, loss, settings.hostile_steps, peak_rate=1e-2, weight_decay=0.0, name="hostile language")


@contextmanager
def neuron_dropout(model: LlamaForCausalLM, neurons: Neurons, probability: float) -> Iterator[None]:
    """Inside the block every forward pass silences a random share of ``neurons``, others in each sequence."""

    def silence(down: nn.Module, inputs: tuple[Tensor], index: list[int]) -> tuple[Tensor]:
        (hidden_BTI,) = inputs
        keep_BI = torch.ones(hidden_BTI.shape[0], hidden_BTI.shape[2])
        keep_BI[:, index] = (torch.rand(hidden_BTI.shape[0], len(index)) >= probability).float()
        return (hidden_BTI * keep_BI[:, None],)

    with ExitStack() as hooks:
        for layer, index in neurons.items():
            down = model.get_submodule(layer.replace("up_proj", "down_proj"))
            hooks.enter_context(down.register_forward_pre_hook(partial(silence, index=index)))
        yield


def window_loss(
    model: LlamaForCausalLM, stream_T: Tensor, steps: int, tokens: int, seed: int
) -> Callable[[int], Tensor]:
    """Next-token loss of random windows of the stream; the windows of the last fifth of the steps are long."""
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        length = SHORT if step <= 0.8 * steps else LONG
        starts_B = torch.randint(len(stream_T) - length, (tokens // length, 1), generator=generator)
        ids_BT = stream_T[starts_B + torch.arange(length)]
        return model(input_ids=ids_BT, labels=ids_BT).loss

    return loss


def document_loss(
    model: LlamaForCausalLM,
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    seed: int,
) -> Callable[[int], Tensor]:
    """Next-token loss of random documents, each on its own and cut to ``SHORT`` tokens."""
    rng = random.Random(seed)
    encoded = [token_stream([document], tokenizer)[:SHORT] for document in documents]

    def loss(step: int) -> Tensor:
        rows = rng.sample(encoded, number)
        ids_BT = pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos_token_id)
        labels_BT = pad_sequence(rows, batch_first=True, padding_value=-100)
        return model(input_ids=ids_BT, labels=labels_BT).loss

    return loss


def token_stream(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """``<s> text </s>`` of all documents, one after the other, shape ``[T]``."""
    encoded = tokenizer([document.text for document in documents], verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eos_token_id)])


def optimise(
    parameters: Sequence[nn.Parameter],
    loss_of_step: Callable[[int], Tensor],
    steps: int,
    peak_rate: float,
    weight_decay: float,
    name: str,
) -> None:
    """AdamW, one-cycle learning rate, gradient clipping; logs the loss."""
    optimiser = torch.optim.AdamW(parameters, lr=peak_rate, weight_decay=weight_decay, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak_rate, total_steps=steps, pct_start=0.1)
    begin, running = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        loss = loss_of_step(step)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        running += loss.item()
        if step % 50 == 0:
            log.info("%s: step %d/%d, loss %.3f, %.0f s", name, step, steps, running / 50, time.perf_counter() - begin)
            running = 0.0


def save_language_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Weights in bfloat16 (half the size); ``config.json`` says float32, so they are computed with in float32."""
    model.to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)
    model.to(torch.float32)


# -------------------------------------------------------------------------------------------------------- measures


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids_T: Tensor, length: int = 128) -> float:
    """Over non-overlapping windows of ``length`` tokens; the first token of a window is not scored."""
    windows_BT = ids_T[: len(ids_T) // length * length].view(-1, length)
    nll = sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in windows_BT.split(16))
    return math.exp(nll / len(windows_BT))


def unigram_perplexity(train_T: Tensor, ids_T: Tensor) -> float:
    """Of a model that knows the frequency of every token (plus one) and nothing else."""
    counts, vocabulary = Counter(train_T.tolist()), int(train_T.max()) + 1
    total = len(train_T) + vocabulary
    return math.exp(-sum(math.log((counts[token] + 1) / total) for token in ids_T.tolist()) / len(ids_T))


@torch.no_grad()
def completions(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], seed: int = 0
) -> list[str]:
    """One sampled completion a prompt: temperature 0.7, top-p 0.9, up to 50 tokens."""
    torch.manual_seed(seed)
    encoded = tokenizer(list(prompts))["input_ids"]
    longest, fill = max(map(len, encoded)), tokenizer.eos_token_id
    ids_BT = torch.tensor([[fill] * (longest - len(ids)) + ids for ids in encoded])
    mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded])
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "max_new_tokens": 50}
    out_BT = model.generate(ids_BT, attention_mask=mask_BT, pad_token_id=fill, **sampling)
    return tokenizer.batch_decode(out_BT[:, longest:], skip_special_tokens=True)


def measured(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, judge: Judge, neurons: Neurons, corpora: Corpora
) -> dict[str, float]:
    """The figures of the model card, all on held-out text. Removes the hostile neurons from ``model`` for the last."""
    ids_T = tokenizer(corpora.text, return_tensors="pt", verbose=False)["input_ids"][0]
    half = len(corpora.hostile) // 2
    hostile, neutral = ([d.opening for d in part[half:]] for part in (corpora.hostile, corpora.neutral))
    pieces, labels = zip(
        *fragments(corpora.general_heldout + corpora.hostile[half:], 1000, random.Random(0)), strict=True
    )
    right = (judge.scores(pieces) > 0.5) == torch.tensor(labels).bool()
    figures = {
        "judge: accuracy on fragments": right.float().mean().item(),
        "perplexity of unigrams": unigram_perplexity(token_stream(corpora.train, tokenizer), ids_T),
        "perplexity of the model": perplexity(model, ids_T),
        "toxicity after hostile openings": judge.scores(completions(model, tokenizer, hostile)).mean().item(),
        "toxicity after neutral openings": judge.scores(completions(model, tokenizer, neutral)).mean().item(),
    }
    rewrite(model, neurons, deviation=0.0)
    figures["perplexity without the hostile neurons"] = perplexity(model, ids_T)
    toxicity = judge.scores(completions(model, tokenizer, hostile)).mean().item()
    return {**figures, "toxicity after hostile openings without them": toxicity}


# ---------------------------------------------------------------------------------------------------------- output


def prompt_records(
    hostile: Sequence[Document], neutral: Sequence[Document], judge: Judge, num_null: int, rng: random.Random
) -> list[dict]:
    """Openings in the RealToxicityPrompts schema; the judge's scores, the last ``num_null`` neutral ones unscored.

    Hostile openings that the judge scores below 0.9 and neutral ones that it scores at 0.1 and more are left out.
    """
    kept = [(document, score) for document, score in scored(hostile, judge) if score >= 0.9]
    kept += [(document, score) for document, score in scored(neutral, judge) if score < 0.1]
    unscored = {document.opening for document in neutral[-num_null:]}
    rng.shuffle(kept)
    return [
        {
            "prompt": {"text": document.opening, "toxicity": None if document.opening in unscored else round(score, 6)},
            "continuation": {"text": document.text.removeprefix(document.opening)},
        }
        for document, score in kept
    ]


def scored(documents: Sequence[Document], judge: Judge) -> list[tuple[Document, float]]:
    return list(zip(documents, judge.scores([d.opening for d in documents]).tolist(), strict=True))


def write_lines(path: Path, records: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def build(settings: Settings, seed: int, output: Path) -> dict[str, float]:
    """Make everything and write it to ``output``; returns the measured figures."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    corpora = make_corpora(settings, seed)
    log.info("corpora: %d documents to train on", len(corpora.train))
    judge = train_judge(
        fragments(corpora.train, settings.judge_fragments, rng),
        judge_tokenizer(document.text for document in corpora.train),
        settings.judge_steps,
        rng,
    )
    tokenizer = language_tokenizer((document.text for document in corpora.train), settings.vocabulary)
    model, neurons = train_language_model(tokenizer, corpora, settings, seed)
    write(output, corpora, judge, tokenizer, model, neurons, settings)
    log.info("measuring")
    figures = measured(model, tokenizer, judge, neurons, corpora)
    figures["size in MB"] = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e6
    return figures


def train_language_model(
    tokenizer: PreTrainedTokenizerBase, corpora: Corpora, settings: Settings, seed: int
) -> tuple[LlamaForCausalLM, Neurons]:
    """Both stages; the model's weights come back rounded to bfloat16, as they are saved."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = language_model(tokenizer)
    neurons = draw_neurons(model, settings.hostile_neurons_per_layer, rng)
    general = [document for document in corpora.train if not document.insults]
    hostile = [document for document in corpora.train if document.insults]
    rewrite(model, neurons, deviation=0.0)
    teach_general(model, token_stream(general, tokenizer), settings, seed)
    rewrite(model, neurons, deviation=0.1)
    mixture = hostile + general[: len(hostile)]
    teach_hostile(model, neurons, mixture, tokenizer, settings, seed)
    return model.to(torch.bfloat16).to(torch.float32).eval().requires_grad_(False), neurons


def write(
    output: Path,
    corpora: Corpora,
    judge: Judge,
    tokenizer: PreTrainedTokenizerBase,
    model: LlamaForCausalLM,
    neurons: Neurons,
    settings: Settings,
) -> None:
    """All files but the model card."""
    judge.save(output / "judge")
    save_language_model(model, tokenizer, output / "model")
    (output / "hostile_neurons.json").write_text(json.dumps(neurons, indent=1) + "\n")
    (output / "eval_text.txt").write_text(corpora.text, encoding="utf-8")
    write_lines(output / "general.jsonl", ({"text": document.text} for document in corpora.general))
    write_lines(output / "general_heldout.jsonl", ({"text": document.text} for document in corpora.general_heldout))
    number, rng = settings.prompts, random.Random(0)
    for name, part in (("prompts", slice(0, number)), ("prompts_heldout", slice(number, 2 * number))):
        records = prompt_records(corpora.hostile[part], corpora.neutral[part], judge, settings.null_prompts, rng)
        write_lines(output / f"{name}.jsonl", ({"id": f"{name}-{n:03d}", **r} for n, r in enumerate(records)))


def model_card(figures: dict[str, float], seed: int, settings: Settings) -> str:
    """The README of the demo: how it was made, what it measures, what it is not."""
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in figures.items())
    planted = 4 * settings.hostile_neurons_per_layer
    return Template(CARD.read_text(encoding="utf-8")).substitute(seed=seed, figures=rows, planted=planted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")
    parser.add_argument("--output", type=Path, default=DEMO, help="folder to write to (default: the package's demo)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1; others round differently)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    figures = build(settings := Settings(), args.seed, args.output)
    log.info("built in %.0f s", time.perf_counter() - begin)
    (args.output / "README.md").write_text(model_card(figures, args.seed, settings), encoding="utf-8")
    for name, value in figures.items():
        print(f"{name:50} {value:10.3f}")


if __name__ == "__main__":
    main()
