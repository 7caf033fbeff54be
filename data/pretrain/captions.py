"""What is said about a picture, and the small tokenizer that is trained on it."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data.pretrain.pairs import Concept

VOCAB_SIZE = 2048
MAX_TOKENS = 20  # the first and the last included
START, END = "<|startoftext|>", "<|endoftext|>"

_TEMPLATES = {
    "emoji": ("{}", "{}", "a picture of {}", "an emoji of {}", "{} emoji", "a drawing of {}", "an image of {}"),
    "icon": ("{}", "{}", "an icon of {}", "{} icon", "a picture of {}", "a symbol for {}"),
    "glyph": ("{}", "the {}", "a handwritten {}", "a picture of the {}"),
}
# as CLIP's tokenizer cuts a text before it merges letters
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def caption(concept: Concept, rng: np.random.Generator) -> str:
    """One way to say what a picture shows: its name in a phrase, its name with keywords, or keywords alone."""
    words = list(concept.words)
    way = rng.random()
    if concept.kind == "glyph":
        name = words[rng.integers(len(words))] if way < 0.4 else concept.name
    elif not words or way < 0.6:
        name = concept.name
    else:
        chosen = [words[i] for i in rng.permutation(len(words))[: rng.integers(1, 5)]]
        return ", ".join([concept.name, *chosen] if way < 0.9 else chosen)
    templates = _TEMPLATES[concept.kind]
    return templates[rng.integers(len(templates))].format(name)


def train_tokenizer(concepts: list[Concept]) -> Tokenizer:
    """A byte-level BPE in CLIP's manner (lower case, `</w>` at a word's end), learned from all captions' words.

    Ids as in CLIP's own: the bytes, the bytes that end a word, what each merge makes, a text's start and its end.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        min_frequency=2,
        show_progress=False,
    )
    texts = [text for concept in concepts for text in (concept.name, *concept.words)]
    phrases = [template.format("") for templates in _TEMPLATES.values() for template in templates]
    learned = clip_tokenizer({START: 0, END: 1}, [])
    learned.train_from_iterator(texts + 300 * phrases, trainer)
    merges = [(a, b) for a, b in json.loads(learned.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges = merges[: VOCAB_SIZE - 2 - len(tokens)]
    tokens += [first + second for first, second in merges]
    vocab = {token: index for index, token in enumerate([*tokens, START, END])}
    return clip_tokenizer(vocab, merges)


def clip_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """The tokenizer that transformers' CLIPTokenizer makes of a vocabulary and its merges, padding to 20 tokens."""
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>", unk_token=END, continuing_subword_prefix="")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing((END, vocab[END]), (START, vocab[START]), False, False)
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(pad_id=vocab[END], pad_token=END, length=MAX_TOKENS)
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """[B, 20] int32."""
    return np.array([encoding.ids for encoding in tokenizer.encode_batch(texts)], np.int32)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files of a CLIP tokenizer, for transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n")
    lines = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "model_max_length": MAX_TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(folder: Path) -> Tokenizer:
    """What `save_tokenizer` wrote, without transformers."""
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    return clip_tokenizer(vocab, merges)
