"""``cm3leon inspect``: the tokens that pretraining reads, of one document's sequence or of a row of a step's batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.data.sequences import PretrainingSamples, Sample
from cm3leon.data.tokens import TokenStore
from cm3leon.sequence.cm3 import Masked
from cm3leon.sequence.grammar import SPECIALS, GrammarError, Segment, Vocabulary, check_grammar
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.training.pretraining import build_vocabulary, training_samples, training_weights
from cm3leon.training.run import make_stream
from cm3leon.utils.errors import UserError

STYLES = {"text": "green", "image": "blue", "special": "bold magenta", "mask": "bold red"}
LEGEND = "text green, image codes blue, special tokens magenta, masks red; retrieved documents in italics; dim: not in the loss"


class UnknownDocumentError(UserError):
    """No document, or more than one, has an id that begins as asked."""


def find_document(document_id: str) -> tuple[TokenStore, int]:
    """The store and row of a document, by its id or an unambiguous prefix of it.

    Raises:
        UnknownDocumentError: if no or several documents match; with some ids to choose from.
    """
    store = TokenStore(paths.TOKENS, ["train", "val", "test"])
    rows = [row for row, known in enumerate(store.ids) if known.startswith(document_id)]
    if len(rows) == 1:
        return store, rows[0]
    examples = ", ".join(store.ids[row] for row in (rows or range(len(store)))[:3])
    if rows:
        problem = f"the ids of {len(rows)} documents begin with {document_id!r}"
    else:
        problem = f"there is no document {document_id!r} in {paths.TOKENS}"
    raise UnknownDocumentError(f"{problem}; for example: {examples}")


@dataclass(frozen=True)
class Token:
    """One token of a sample.

    Attributes:
        position: in the sample.
        id: in the vocabulary.
        role: text, image, or the name of a special token.
        content: decoded text, or number of the image code; empty for a special token.
        document: label of its document (:func:`label_of`); empty for a token between documents.
        in_loss: whether the loss counts it.
    """

    position: int
    id: int
    role: str
    content: str
    document: str
    in_loss: bool

    @property
    def style(self) -> str:
        kind = "mask" if self.role.startswith("<mask") else "special" if self.role in SPECIALS else self.role
        italic = " italic" if self.document.startswith("retrieved") else ""
        dim = "" if self.in_loss else " dim"
        return STYLES.get(kind, "") + italic + dim


def segments_of(masked: Masked) -> list[Segment | None]:
    """The segment of each token of a masked sequence; None for special tokens, which are in no segment.

    A masked sequence is the body with a sentinel in place of each span, then each span after its sentinel, then the end of the sequence
    (CM3, arXiv 2201.07520, section 2).
    """
    of_body: list[Segment | None] = [None] * len(masked.body.tokens)
    for segment in masked.body.segments:
        of_body[segment.start : segment.stop] = [segment] * segment.length
    body: list[Segment | None] = []
    tail: list[Segment | None] = []
    position = 0
    for start, stop in masked.spans:
        body += [*of_body[position:start], None]
        tail += [None, *of_body[start:stop], None]
        position = stop
    return [*body, *of_body[position:], *tail, None]


def tokens_of(sample: Sample, vocabulary: Vocabulary, tokenizer: TextTokenizer) -> list[Token]:
    """The tokens of a sample, in order."""
    masked = sample.masked
    ids = masked.tokens.tolist()
    counted = (sample.weights > 0).tolist()
    tokens = []
    for position, (token, in_loss, segment) in enumerate(zip(ids, counted, segments_of(masked), strict=True)):
        role = vocabulary.role(token)
        content = ""
        if role == "text":
            content = tokenizer.decode([token - vocabulary.text_start])
        elif role == "image":
            content = str(token - vocabulary.image_start)
        document = "" if segment is None else label_of(segment.document, len(sample.documents))
        # The first token of a sample is never predicted.
        tokens.append(Token(position, token, role, content, document, in_loss and position > 0))
    return tokens


def label_of(document: int, count: int) -> str:
    """Label of a sample's document, by its index among ``count``: the query is the last one, after the retrieved documents."""
    return "query" if document == count - 1 else f"retrieved {document + 1}"


def line(tokens: Sequence[Token]) -> Text:
    """The tokens in color: text as it is, image codes as numbers, special tokens by name."""
    colored = Text()
    for token in tokens:
        colored.append(token.content if token.role == "text" else f" {token.content or token.role} ", style=token.style)
    return colored


def table(tokens: Sequence[Token], console: Console) -> None:
    """Print a line for each token: position, role, document, id and content. A run of image codes is one line."""
    for (image, _), group in itertools.groupby(tokens, key=lambda token: (token.role == "image", token.document)):
        run = list(group)
        lines = [run] if image else [[token] for token in run]
        for printed in lines:
            token = printed[0]
            start, stop = token.position, printed[-1].position
            positions = f"{start:>5}–{stop:<5}" if len(printed) > 1 else f"{start:>5}      "
            if image:
                content = f"{len(printed)} codes: {' '.join(code.content for code in printed)}"
            else:
                content = f"{token.id:>6} {token.content!r}" if token.content else f"{token.id:>6}"
            note = "" if any(one.in_loss for one in printed) else "  (not in the loss)"
            text = f"{positions} {token.role:<9} {token.document:<12} {content}{note}"
            console.print(text, style=token.style, markup=False, highlight=False, soft_wrap=True)


def heading(sample: Sample, candidates: Sequence[str]) -> list[str]:
    """Lines about a sample: its documents, the neighbors from which they were sampled, and what is masked."""
    masked = sample.masked
    ids = sample.documents
    present = {segment.document for segment in masked.body.segments if segment.length}
    lines = []
    for number, document_id in enumerate(ids):
        note = "" if number in present else "  (cut: too long for the context)"
        lines.append(f"  {label_of(number, len(ids))}: {document_id}{note}")
    lines.append(f"  neighbors in the table: {', '.join(candidates) or 'none'}")
    for number, (start, stop) in enumerate(masked.spans):
        parts = []
        for segment in masked.body.segments:  # a span has several where it may cross breaks
            shared = min(stop, segment.stop) - max(start, segment.start)
            if shared > 0:
                amount = "all" if shared == segment.length else f"{shared} of {segment.length} tokens"
                parts.append(f"{amount} of the {label_of(segment.document, len(ids))}'s {segment.modality}")
        lines.append(f"  <mask:{number}>: {' and '.join(parts) or 'nothing, an empty span'}")
    return lines if masked.spans else [*lines, "  nothing masked"]


def show(sample: Sample, source: PretrainingSamples, tokenizer: TextTokenizer, console: Console) -> None:
    """Print a sample token by token.

    Raises:
        GrammarError: if it violates the grammar, after everything is printed.
    """
    tokens = tokens_of(sample, source.vocabulary, tokenizer)
    console.print(f"{len(tokens)} tokens", style="bold", highlight=False)
    for text in heading(sample, source.neighbors.get(sample.documents[-1], [])):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    table(tokens, console)
    console.print(f"\n{LEGEND}", highlight=False)
    console.print(line(tokens), soft_wrap=True)
    try:
        check_grammar(sample.masked.tokens, source.vocabulary)
    except GrammarError as error:
        raise GrammarError(f"the sequence of document {sample.documents[-1]} violates the grammar: {error}") from None
    console.print("\nThe sequence follows the grammar.", style="bold")


def show_document(document_id: str, console: Console, config: Config, epoch: int = 0) -> None:
    """Print the sequence on which pretraining trains for a document in an epoch.

    Raises:
        UnknownDocumentError: as :func:`find_document`.
        GrammarError: if the sequence violates the grammar.
    """
    store, row = find_document(document_id)
    source = training_samples(store, build_vocabulary(config.pretrain.model), config.pretrain, config.seed)
    console.print(f"document {store.ids[row]}, epoch {epoch}", highlight=False)
    show(source(epoch, row), source, TextTokenizer.load(paths.TEXT_TOKENIZER), console)


def show_row(step: int, row: int, console: Console, config: Config) -> None:
    """Print a sample of a step, both counted from 0.

    Raises:
        UserError: if the step has no such sample.
        GrammarError: if the sequence violates the grammar.
    """
    section = config.pretrain
    if not 0 <= step < section.steps:
        raise UserError(f"there is no step {step}: steps are 0 to {section.steps - 1}")
    store = TokenStore(paths.TOKENS, ["train"])
    source = training_samples(store, build_vocabulary(section.model), section, config.seed)
    stream = make_stream(source, len(store), section, config.seed, section.model.context, training_weights(store, config.seed))
    # Packing is sequential: what a step leaves of its budget is added to the next one's.
    for number in range(step + 1) if section.packing else [step]:
        samples = stream.samples(number)
    if not 0 <= row < len(samples):
        raise UserError(f"there is no row {row} in step {step}: its samples are 0 to {len(samples) - 1}")
    console.print(f"step {step}, sample {row} of {len(samples)}", highlight=False)
    show(samples[row], source, TextTokenizer.load(paths.TEXT_TOKENIZER), console)
