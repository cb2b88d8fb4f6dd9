"""A small tokenizer for models that are trained from nothing on a few tasks.

Models this small learn characters well and large vocabularies badly. So every byte is a token, digits and letters
stay by themselves (a model cannot spell or add what it sees as one piece), and only the words that a task's questions
have in common, its boilerplate, become tokens of their own, which makes prompts several times shorter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from megatron_dppo.tasks.task import Task

_SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")  # ids 0, 1, 2

# Letters, or punctuation, with the space before them; every digit by itself; white space as it comes.
_PIECES = Regex(r" ?\p{L}+|\d| ?[^\s\p{L}\d]+|\s")


def train_tokenizer(
    tasks: Sequence[Task], problems_per_task: int = 500, min_share: float = 0.25
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose words are the boilerplate of the tasks' questions.

    Args:
        tasks: whose questions are read.
        problems_per_task: how many of them, at most.
        min_share: a word becomes a token if it is in at least this share of one task's questions.

    Returns:
        A tokenizer that encodes any text without loss, has no chat template, and adds no special tokens; the same tasks
        give the same tokenizer.
    """
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words: set[str] = set()
    for task in tasks:
        words |= _boilerplate(task, splitter, problems_per_task, min_share)
    pieces = [*_SPECIAL_TOKENS, *alphabet, *sorted(words - set(alphabet))]
    # Without merges, and with a piece that is in the vocabulary taken whole, a piece is one token or its bytes.
    tokenizer = Tokenizer(BPE({piece: index for index, piece in enumerate(pieces)}, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = _SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )


def _boilerplate(task: Task, splitter: pre_tokenizers.Sequence, problems_per_task: int, min_share: float) -> set[str]:
    """The pieces, in byte-level spelling, that are in many of the task's questions."""
    count = min(len(task), problems_per_task)
    seen_in: Counter[str] = Counter()
    for index in range(count):
        seen_in.update({piece for piece, _ in splitter.pre_tokenize_str(task[index].question)})
    return {piece for piece, questions in seen_in.items() if questions >= min_share * count}
