"""Language modelling: text in, documents kept apart, scored in bits per byte beside an n-gram model."""

from tidegate.tasks.language.corpus import open_source
from tidegate.tasks.language.data import Corpus, Rows, open_corpus, prepare
from tidegate.tasks.language.metrics import Score, evaluate
from tidegate.tasks.language.ngram import NGram
from tidegate.tasks.language.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "Corpus",
    "NGram",
    "Rows",
    "Score",
    "Tokenizer",
    "evaluate",
    "load_tokenizer",
    "open_corpus",
    "open_source",
    "prepare",
]
