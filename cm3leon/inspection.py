"""``cm3leon inspect``: the training sequence of one document, token by token, with each token's role."""

from __future__ import annotations

import itertools

import numpy as np
from rich.console import Console
from rich.text import Text

from cm3leon import paths
from cm3leon.config import Config
from cm3leon.data.tokens import TokenStore
from cm3leon.documents import SPECIALS, Vocabulary, check_grammar
from cm3leon.objective import Masked
from cm3leon.stages.pretrain import build_vocabulary, training_samples
from cm3leon.tokenizers.text import TextTokenizer

STYLES = {"text": "green", "image": "blue", "special": "bold magenta", "mask": "bold red"}


class UnknownDocumentError(LookupError):
    """No split holds a document of this id."""


def find_document(name: str) -> tuple[TokenStore, int]:
    """The store and row of a document, by its id or an unambiguous beginning of it.

    Raises:
        UnknownDocumentError: if none or several match; with ids to choose from.
    """
    store = TokenStore(paths.TOKENS, ["train", "val", "test"])
    rows = [row for row, known in enumerate(store.ids) if known.startswith(name)]
    if len(rows) == 1:
        return store, rows[0]
    examples = ", ".join(store.ids[row] for row in (rows or range(len(store)))[:3])
    problem = f"{len(rows)} documents begin with {name!r}" if rows else f"no document {name!r} in {paths.TOKENS}"
    raise UnknownDocumentError(f"{problem}; for example: {examples}")


def style_of(token: int, vocabulary: Vocabulary) -> str:
    role = vocabulary.role(token)
    return STYLES["mask" if role.startswith("<mask") else "special" if role in SPECIALS else role]


def describe(masked: Masked, vocabulary: Vocabulary, tokenizer: TextTokenizer) -> Text:
    """The sequence in colour: text as it reads, image codes as numbers, marks by name; what is no target of the loss is dim."""
    line = Text()
    for token, is_target in zip(masked.tokens.tolist(), masked.is_target.tolist(), strict=True):
        role = vocabulary.role(token)
        shown = {
            "text": lambda t=token: tokenizer.decode([t - vocabulary.text_start]),
            "image": lambda t=token: f" {t - vocabulary.image_start}",
        }
        part = shown[role]() if role in shown else f" {role} "
        line.append(part, style=style_of(token, vocabulary) + ("" if is_target else " dim"))
    return line


def table(masked: Masked, vocabulary: Vocabulary, tokenizer: TextTokenizer, console: Console) -> None:
    """One line a token: position, id, role, content, whether the loss counts it; runs of image codes are folded."""
    numbered = list(enumerate(zip(masked.tokens.tolist(), masked.is_target.tolist(), strict=True)))
    for image, group in itertools.groupby(numbered, key=lambda item: vocabulary.role(item[1][0]) == "image"):
        items = list(group)
        if image:
            codes = " ".join(str(token - vocabulary.image_start) for _, (token, _) in items)
            console.print(f"{items[0][0]:>5}–{items[-1][0]:<5} image   {len(items)} codes: {codes}", style=STYLES["image"], soft_wrap=True)
            continue
        for position, (token, is_target) in items:
            role = vocabulary.role(token)
            content = repr(tokenizer.decode([token - vocabulary.text_start])) if role == "text" else ""
            note = "" if is_target else "  (not in the loss)"
            console.print(
                f"{position:>5}       {role:<9} {token:>6} {content}{note}",
                style=style_of(token, vocabulary),
                markup=False,
                highlight=False,
            )


def show(document_id: str, console: Console, config: Config, epoch: int = 0) -> None:
    """Print the sequence that pretraining makes of a document in an epoch.

    Raises:
        UnknownDocumentError: if there is no such document.
        GrammarError: if the sequence violates the grammar.
    """
    store, row = find_document(document_id)
    section = config.pretrain
    vocabulary, tokenizer = build_vocabulary(section.model), TextTokenizer.load(paths.TEXT_TOKENIZER)
    samples = training_samples(store, vocabulary, section, config.seed)
    masked, _ = samples(epoch, row)
    name = store.ids[row]
    console.print(
        f"document {name}, epoch {epoch}: {len(masked.tokens)} tokens, masked spans {list(masked.spans) or 'none'}", highlight=False
    )
    console.print(f"neighbours in the table: {', '.join(samples.neighbours.get(name, [])) or 'none'}", highlight=False)
    table(masked, vocabulary, tokenizer, console)
    console.print()
    console.print(describe(masked, vocabulary, tokenizer), soft_wrap=True)
    check_grammar(np.asarray(masked.tokens), vocabulary)
    console.print("\nThe sequence follows the grammar.", style="bold")
