"""``cm3leon inspect``: what pretraining reads, token by token: the sequence of one document, or a row of a step's batch."""

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
from cm3leon.training.pretraining import build_vocabulary, training_samples
from cm3leon.training.run import make_stream
from cm3leon.utils.errors import UserError

STYLES = {"text": "green", "image": "blue", "special": "bold magenta", "mask": "bold red"}
LEGEND = "text green, image codes blue, marks magenta, masks red; retrieved documents in italics; dim: not in the loss"


class UnknownDocumentError(UserError):
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


@dataclass(frozen=True)
class Token:
    """One token of a sample, and all that is said of it."""

    position: int
    id: int
    role: str
    content: str
    document: str
    counts: bool

    @property
    def style(self) -> str:
        kind = "mask" if self.role.startswith("<mask") else "special" if self.role in SPECIALS else self.role
        return STYLES.get(kind, "") + (" italic" if self.document.startswith("retrieved") else "") + ("" if self.counts else " dim")


def segments_of(masked: Masked) -> list[Segment | None]:
    """For each token of a sequence the segment of the body that it is from; None for what is in none."""
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
    """The tokens of a sample; a document is called ``query`` or ``retrieved 1`` ..., in the order in which they stand."""
    masked = sample.masked
    tokens = []
    for position, (token, counts, segment) in enumerate(
        zip(masked.tokens.tolist(), (sample.weights > 0).tolist(), segments_of(masked), strict=True)
    ):
        role = vocabulary.role(token)
        content = tokenizer.decode([token - vocabulary.text_start]) if role == "text" else str(token - vocabulary.image_start)
        document = "" if segment is None else name_of(segment.document, len(sample.documents))
        tokens.append(Token(position, token, role, content if role in ("text", "image") else "", document, counts and position > 0))
    return tokens


def name_of(document: int, count: int) -> str:
    """What the ``document``-th of ``count`` documents of a sample is called."""
    return "query" if document == count - 1 else f"retrieved {document + 1}"


def line(tokens: Sequence[Token]) -> Text:
    """The tokens in color: text as it reads, image codes as numbers, marks by name."""
    found = Text()
    for token in tokens:
        found.append(token.content if token.role == "text" else f" {token.content or token.role} ", style=token.style)
    return found


def table(tokens: Sequence[Token], first: int, console: Console) -> None:
    """A line for each token: its place in the row, id, role, document, content; a run of image codes is one line."""
    for (image, _), group in itertools.groupby(tokens, key=lambda token: (token.role == "image", token.document)):
        run = list(group)
        shown = [run] if image else [[token] for token in run]
        for part in shown:
            start, stop = first + part[0].position, first + part[-1].position
            place = f"{start:>5}–{stop:<5}" if len(part) > 1 else f"{start:>5}      "
            what = f"{len(part)} codes: {' '.join(token.content for token in part)}" if image else f"{part[0].id:>6} {part[0].content!r}"
            what = what if part[0].content else f"{part[0].id:>6}"
            note = "" if any(token.counts for token in part) else "  (not in the loss)"
            text = f"{place} {part[0].role:<9} {part[0].document:<12} {what}{note}"
            console.print(text, style=part[0].style, markup=False, highlight=False, soft_wrap=True)


def heading(sample: Sample, candidates: Sequence[str]) -> list[str]:
    """What a sample is made of: its documents, the neighbors it could have had, and what is masked."""
    masked, names = sample.masked, sample.documents
    present = {segment.document for segment in masked.body.segments if segment.length}
    lines = [f"  {name_of(number, len(names))}: {name}" for number, name in enumerate(names)]
    lines = [text if number in present else f"{text}  (cut away for room)" for number, text in enumerate(lines)]
    lines.append(f"  neighbors in the table: {', '.join(candidates) or 'none'}")
    for number, (start, stop) in enumerate(masked.spans):
        segment = next(s for s in masked.body.segments if s.start <= start and stop <= s.stop)
        whole = "all" if (start, stop) == (segment.start, segment.stop) else f"{stop - start} of {segment.length} tokens"
        lines.append(f"  <mask:{number}>: {whole} of the {name_of(segment.document, len(names))}'s {segment.modality}")
    return lines if masked.spans else [*lines, "  nothing masked"]


def show(samples: Sequence[Sample], length: int, source: PretrainingSamples, tokenizer: TextTokenizer, console: Console) -> None:
    """Print a row of ``length`` tokens and what its samples are.

    Raises:
        GrammarError: naming the first sample that violates the grammar, after all is printed.
    """
    first = 0
    rows = [tokens_of(sample, source.vocabulary, tokenizer) for sample in samples]
    for number, (sample, tokens) in enumerate(zip(samples, rows, strict=True), 1):
        count = f"sample {number} of {len(samples)}: " if len(samples) > 1 else ""
        console.print(f"{count}{len(tokens)} tokens, from {first}", style="bold", highlight=False)
        for text in heading(sample, source.neighbors.get(sample.documents[-1], [])):
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        table(tokens, first, console)
        first += len(tokens)
    if first < length:
        console.print(f"{first:>5}–{length - 1:<5} <pad>", style="dim", highlight=False)
    console.print(f"\n{LEGEND}", highlight=False)
    for tokens in rows:
        console.print(line(tokens), soft_wrap=True)
    for sample in samples:
        try:
            check_grammar(sample.masked.tokens, source.vocabulary)
        except GrammarError as error:
            raise GrammarError(f"the sequence of document {sample.documents[-1]} violates the grammar: {error}") from None
    console.print("\nEvery sequence follows the grammar.", style="bold")


def show_document(document_id: str, console: Console, config: Config, epoch: int = 0) -> None:
    """Print the sequence that pretraining makes of a document in an epoch.

    Raises:
        UnknownDocumentError: if there is no such document.
        GrammarError: if the sequence violates the grammar.
    """
    store, row = find_document(document_id)
    source = training_samples(store, build_vocabulary(config.pretrain.model), config.pretrain, config.seed)
    console.print(f"document {store.ids[row]}, epoch {epoch}", highlight=False)
    sample = source(epoch, row)
    show([sample], len(sample.masked.tokens), source, TextTokenizer.load(paths.TEXT_TOKENIZER), console)


def show_row(step: int, row: int, console: Console, config: Config) -> None:
    """Print a row of the batch that pretraining reads in a step, counted from 0, with ``packing`` all samples that share it.

    Raises:
        UserError: if the batch has no such row.
        GrammarError: if a sequence violates the grammar.
    """
    section = config.pretrain
    if not 0 <= row < section.batch_size or not 0 <= step < section.steps:
        raise UserError(f"there is no row {row} in step {step}: rows are 0 to {section.batch_size - 1}, steps 0 to {section.steps - 1}")
    store = TokenStore(paths.TOKENS, ["train"])
    source = training_samples(store, build_vocabulary(section.model), section, config.seed)
    stream = make_stream(source, len(store), section, config.seed, section.model.context)
    for number in range(step + 1) if section.packing else [step]:  # packed rows come one after another
        [samples] = stream.samples(number, [row])
    length = section.model.context if section.packing else len(samples[0].masked.tokens)
    console.print(f"step {step}, row {row}: {len(samples)} samples in {length} tokens", highlight=False)
    show(samples, length, source, TextTokenizer.load(paths.TEXT_TOKENIZER), console)
