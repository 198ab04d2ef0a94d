"""``cm3leon inspect`` shows what training reads: every token, its role and document, and whether the grammar holds."""

import io
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cm3leon.cli import app, inspect_sequence
from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.data.tokens import Document, TokenStore, write_tokens
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.training.pretraining import build_vocabulary, training_samples
from cm3leon.training.run import make_stream
from cm3leon.utils.errors import UserError

PACKED = {
    "model": {"layers": 1, "width": 32, "heads": 2, "context": 400, "sentinels": 4}, "steps": 20, "batch_size": 2, "packing": True,
    "retrieved_documents": [0.3, 0.4, 0.3], "objective": {"mean_masks": 2.0, "segment_rate": 0.3},
}  # fmt: skip
CONFIG = Config.model_validate({"pretrain": PACKED})


@pytest.fixture
def project(tiny_models, tmp_path, monkeypatch):
    for path in (paths.TEXT_TOKENIZER, paths.IMAGE_TOKENIZER, paths.TOKENS, paths.VALIDATED):
        shutil.copytree(tiny_models / path, tmp_path / path)
    monkeypatch.chdir(tmp_path)
    document = TokenStore(paths.TOKENS)[0]
    for split, document_id in (("val", "e1"), ("test", "e2")):
        write_tokens(paths.TOKENS, split, [Document(document_id, document.codes, document.captions)], len(document.codes), 100)
    neighbors = {document_id: [other for other in "abcd" if other != document_id][:2] for document_id in "abcd"}
    rows = [{"id": key, "neighbours": found, "modalities": ["text", "image"], "random": []} for key, found in neighbors.items()]
    paths.NEIGHBORS.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), paths.NEIGHBORS / "neighbours.parquet")
    return tmp_path


def source():
    return training_samples(TokenStore(paths.TOKENS), build_vocabulary(CONFIG.pretrain.model), CONFIG.pretrain, CONFIG.seed)


def printed(show, *arguments):
    console = Console(record=True, width=200, force_terminal=True, file=io.StringIO())
    show(*arguments[:-1], console, arguments[-1])
    return console.export_text(clear=False), console.export_text(styles=True)


def test_every_token_of_a_sample_is_shown_with_its_document(project):
    samples, tokenizer = source(), TextTokenizer.load(paths.TEXT_TOKENIZER)
    vocabulary = samples.vocabulary
    seen = set()
    for epoch in range(100):
        sample = samples(epoch, 1)
        tokens = inspect_sequence.tokens_of(sample, vocabulary, tokenizer)
        assert [token.id for token in tokens] == sample.masked.tokens.tolist()
        assert [token.in_loss for token in tokens][1:] == (sample.weights > 0).tolist()[1:]
        # Joined by document, the tokens are those of the documents.
        for number, document_id in enumerate(sample.documents):
            own = [token for token in tokens if token.document == inspect_sequence.label_of(number, len(sample.documents))]
            document = samples.pool.by_id(document_id)
            assert [int(token.content) for token in own if token.role == "image"] == document.codes.tolist()
            assert sorted(t.id - vocabulary.text_start for t in own if t.role == "text") == sorted(document.captions[0].tolist())
        assert all(token.document == "" for token in tokens if token.role.startswith("<"))
        seen.add((len(sample.documents), len(sample.masked.spans) > 0))
    assert {(1, True), (2, True), (3, True), (2, False)} <= seen


def test_a_document_is_shown_with_its_neighbors_and_masks(project):
    samples = source()
    epoch = next(e for e in range(100) if len(samples(e, 0).documents) == 3 and samples(e, 0).masked.spans)
    sample = samples(epoch, 0)
    plain, colored = printed(lambda console, config: inspect_sequence.show_document("a", console, config, epoch), CONFIG)
    first, second, query = sample.documents
    assert query == "a"
    for expected in (f"retrieved 1: {first}", f"retrieved 2: {second}", "query: a", "neighbors in the table: b, c", "follows the grammar"):
        assert expected in plain
    assert len(re.findall(r"^  <mask:\d>: ", plain, re.MULTILINE)) == len(sample.masked.spans)
    assert "\x1b[" in colored


def test_of_a_mask_across_breaks_all_that_it_hides_is_named(project):
    pretrain = Config.model_validate({"pretrain": {**PACKED, "objective": {"mean_masks": 2.0, "across_breaks": True}}}).pretrain
    samples = training_samples(TokenStore(paths.TOKENS), build_vocabulary(pretrain.model), pretrain, CONFIG.seed)
    several = 0
    for epoch in range(50):
        sample = samples(epoch, 0)
        shown = [line for line in inspect_sequence.heading(sample, []) if "<mask:" in line]
        for line, (start, stop) in zip(shown, sample.masked.spans, strict=True):
            parts = [s for s in sample.masked.body.segments if s.start < stop and start < s.stop]
            assert [found[1] for found in re.finditer(r"'s (text|image)", line)] == [s.modality for s in parts]
            several += len(parts) > 1
    assert several > 5


def test_a_packed_sample_is_what_training_reads_in_that_step(project):
    samples = source()
    stream = make_stream(samples, len(samples), CONFIG.pretrain, CONFIG.seed, 400)
    expected = [stream.samples(step) for step in range(4)][3]
    plain, _ = printed(inspect_sequence.show_row, 3, 1, CONFIG)
    assert len(expected) > 1 and f"sample 1 of {len(expected)}" in plain
    shown = {}
    for line in plain.splitlines():
        if found := re.match(r" *(\d+) +(\S+) +(?:query|retrieved \d+)? +(\d+)", line):
            shown[int(found[1])] = int(found[3])
        if found := re.match(r" *(\d+)–\d+ +image +(?:query|retrieved \d+) +\d+ codes: ([\d ]+)", line):
            shown |= {int(found[1]) + n: int(code) + samples.vocabulary.image_start for n, code in enumerate(found[2].split())}
    assert shown == dict(enumerate(expected[1].masked.tokens.tolist()))


def test_unknown_documents_rows_and_steps_are_errors(project):
    with pytest.raises(inspect_sequence.UnknownDocumentError, match="there is no document 'f' in data/tokens; for example: a, b, c"):
        inspect_sequence.find_document("f")
    with pytest.raises(UserError, match=r"no row 99 in step 0: its samples are 0 to \d+"):
        inspect_sequence.show_row(0, 99, Console(), CONFIG)
    with pytest.raises(UserError, match="no step 20: steps are 0 to 19"):
        inspect_sequence.show_row(20, 0, Console(), CONFIG)


def test_a_sequence_that_violates_the_grammar_is_exit_status_2(project, monkeypatch, capsys):
    """Tokens of another tokenizer: one id is not in the vocabulary."""
    store = TokenStore(paths.TOKENS)
    documents = [Document(d.id, d.codes.copy(), [text + 10_000 for text in d.captions]) for d in (store[row] for row in range(4))]
    write_tokens(paths.TOKENS, "train", documents, len(documents[0].codes), 100)
    monkeypatch.setattr("cm3leon.config.loading.load_config", lambda: CONFIG)
    with pytest.raises(SystemExit) as left, app.plain_errors():
        app.app(["inspect", "a"], standalone_mode=False)
    assert left.value.code == 2
    assert "error: the sequence of document a violates the grammar: token " in capsys.readouterr().err


def test_either_a_document_or_a_row(project):
    for arguments in (["inspect"], ["inspect", "a", "--step", "1"]):
        result = CliRunner().invoke(app.app, arguments)
        assert result.exit_code != 0 and "--step 0 --row 0" in str(result.exception)
