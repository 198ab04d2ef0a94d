"""Scores of generated images, captions and answers, their intervals and calibrations, and the evaluation record."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from cm3leon.evaluation import measure
from cm3leon.evaluation.captions import score
from cm3leon.evaluation.record import Record, bootstrap, digest, keyed, paired_differences, wilson
from cm3leon.scenes import text
from cm3leon.scenes.scene import sample_scene


def test_interval_covers_the_mean_and_shrinks_with_more_prompts():
    rng = np.random.default_rng(0)
    few, many = rng.random(50), rng.random(5000)
    for values in (few, many):
        low, high = bootstrap(values, 500, 0)
        assert low < values.mean() < high
    assert np.diff(bootstrap(many, 500, 0)) < np.diff(bootstrap(few, 500, 0)) / 5
    normal = 1.96 * many.std() / np.sqrt(len(many))
    assert np.diff(bootstrap(many, 2000, 0)) / 2 == pytest.approx(normal, rel=0.1)


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = Record(contract={"prompts": digest(["a", "b"])})
    record.add("score", {"a": 0.0, "b#0": 1.0, "b#1": 1.0}, 100, 0)
    record.seen = ["a"]
    record.write(tmp_path)
    again = Record.read(tmp_path)
    assert again.scores == {"score": 0.666667} and again.contract == record.contract
    assert again.intervals["score"][0] <= 2 / 3 <= again.intervals["score"][1]
    assert again.outcomes == record.outcomes and again.seen == ["a"]


def test_decoding_in_the_contract_of_an_earlier_version_is_part_of_the_model(tmp_path):
    Record(contract={"prompts": "1", "decoding": {"candidates": 8}, "retrieval": None}).write(tmp_path)
    (tmp_path / "outcomes.parquet").unlink()
    again = Record.read(tmp_path)
    assert again.contract == {"prompts": "1"} and again.outcomes == {}


def test_digest_depends_on_content_and_order_of_lists_not_of_keys():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})
    assert digest([1, 2]) != digest([2, 1])


class ColorEncoder:
    """Embeds an image by its mean color and a text by the color it names."""

    COLORS = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}

    def encode_images(self, images):
        means = np.stack([np.asarray(i).reshape(-1, 3).mean(0) for i in images])
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def encode_texts(self, texts):
        return np.array([self.COLORS[t] for t in texts])


def flat(*color):
    return Image.new("RGB", (8, 8), color)


def test_image_scores_and_their_calibrations():
    prompts = ["red", "red", "green", "green", "blue", "blue"]
    real = [flat(250, 0, 0)] * 2 + [flat(0, 250, 0)] * 2 + [flat(0, 0, 250)] * 2
    record = Record()
    measure.measure_images(record, ColorEncoder(), list("abcdef"), prompts, real, real, real, 100, 0)
    assert record.scores["clip_score"] == pytest.approx(1) and record.calibration["clip_score_other_captions"] == pytest.approx(0)
    assert record.scores["fd_encoder"] == pytest.approx(0, abs=1e-6)
    wrong = Record()
    measure.measure_images(wrong, ColorEncoder(), list("abcdef"), prompts, [flat(250, 250, 250)] * 6, real, real, 100, 0)
    assert wrong.scores["clip_score"] < 0.6 and wrong.scores["fd_encoder"] > 0.1


def test_baselines_of_answers_are_other_images_and_the_majority_answer():
    questions = ["What color is it?", "What color is that?", "How many are there?"]
    truths = [["red"], ["blue"], ["2"]]
    known = Counter({("What color?", "red"): 5, ("What color are they?", "blue"): 1, ("How many?", "3"): 9})
    record = Record()
    measure.measure_answers(record, questions, ["red", "blue", "3"], ["blue", "2", "2"], truths, ["x#0", "x#1", "y#0"], known, 100, 0)
    assert record.scores["vqa_accuracy"] == pytest.approx(2 / 3)
    assert record.scores["vqa_accuracy/what_color"] == 1 and record.scores["vqa_accuracy/how_many"] == 0
    assert record.calibration["vqa_accuracy_other_images"] == pytest.approx(1 / 3)
    assert record.calibration["vqa_accuracy_majority"] == pytest.approx(1 / 3)


def test_the_majority_answer_is_of_the_same_question_where_training_has_it():
    """Answers that repeat the question, as "the cross is red", are all different within a kind of question."""
    questions = ["What color is the cross?", "What color is the ring?", "What color is the star?"]
    truths = [["the cross is red"], ["the ring is blue"], ["the ring is blue"]]
    known = Counter({(questions[0], truths[0][0]): 2, (questions[0], "the cross is blue"): 1, (questions[1], truths[1][0]): 3})
    record = Record()
    measure.measure_answers(record, questions, ["?"] * 3, None, truths, ["x#0", "y#0", "z#0"], known, 10, 0)
    assert record.calibration["vqa_accuracy_majority"] == 1


def test_the_other_image_of_a_question_is_not_the_next_one():
    """Next to an image lies its edited version, of which most of the answers are the same."""
    rows = [f"{scene}{version}" for scene in "abcdef" for version in ("", "-edited") for _ in range(3)]
    found = measure.images_of_others(rows)
    assert found is not None and all(other[0] != own[0] for own, other in zip(rows, found, strict=True))
    assert all(rows[other][0] != rows[own][0] for own, other in enumerate(measure.shifted_positions(len(rows))))


def test_kinds_of_questions_are_valid_metric_names():
    assert measure.question_kind("What color is it?") == "what_color"
    assert measure.question_kind("Where's Wally/Waldo?") == "where_s_wally_waldo"
    assert measure.question_kind("¿?") == measure.question_kind("") == "other"
    assert len(measure.question_kind("x" * 900)) == measure.KIND_CHARACTERS


def test_only_the_most_frequent_kinds_of_questions_have_a_score():
    questions = [f"kind {number}?" for number in range(30) for _ in range(number + 1)]
    record, keys = Record(), [f"x#{number}" for number in range(len(questions))]
    measure.measure_answers(record, questions, ["a"] * len(questions), None, [["a"]] * len(questions), keys, Counter(), 10, 0)
    kinds = {name for name in record.scores if "/" in name}
    assert kinds == {f"vqa_accuracy/kind_{number}" for number in range(30 - measure.KINDS, 30)}
    assert "vqa_accuracy_other_images" not in record.calibration


@pytest.mark.parametrize("images", ["aaabbc", "abcabc", "aab", "ab", "abbbbb"])
def test_images_of_other_questions_are_never_the_own(images):
    found = measure.images_of_others(images)
    assert len(found) == len(images) and all(other != own for own, other in zip(images, found, strict=True))
    assert set(found) <= set(images)


def test_a_single_image_has_no_other_images():
    assert measure.images_of_others(["a", "a"]) is None


def test_a_single_record_has_neither_distances_nor_baselines():
    record, image, caption = Record(), [flat(250, 0, 0)], "a red circle on a white background"
    measure.measure_images(record, ColorEncoder(), ["a"], ["red"], image, image, image, 10, 0)
    measure.measure_composition(record, ["a"], [caption], image, image, image, 10, 0)
    measure.measure_captions(record, ["a"], [caption], [[caption]], 10, 0)
    assert set(record.calibration) == {"clip_score_real", "composition_real", "composition_reconstructions"}
    assert {"clip_score", "composition", "cider"} <= set(record.scores) and "fd_encoder" not in record.scores


def test_captions_score_less_for_other_images():
    names = ["a", "b", "c"]
    texts = ["a red circle on white", "two blue squares on black", "the letter A in green on gray"]
    record = Record()
    measure.measure_captions(record, names, texts, [[t] for t in texts], 10, 0)
    assert record.scores["cider"] > 5 and record.scores["bleu_4"] == pytest.approx(1, abs=1e-3)
    assert record.calibration["cider_other_images"] < 1


def test_a_reference_is_scored_against_the_other_references():
    references = [["a red circle on white", "a red circle", "one red circle"], ["two blue squares", "two squares on black"], ["a ring"]]
    record = Record()
    measure.measure_captions(record, ["a", "b", "c"], ["a red circle", "two blue squares", "a ring"], references, 10, 0)
    several = {"a": references[0], "b": references[1]}
    rest = {name: texts[1:] for name, texts in several.items()}
    assert record.calibration["cider_one_reference"] == score({name: texts[0] for name, texts in several.items()}, rest)["cider"]
    assert record.calibration["cider_beside_one_reference"] == score({"a": "a red circle", "b": "two blue squares"}, rest)["cider"]
    low, high = record.intervals["cider"]
    assert low <= record.scores["cider"] <= high


def test_fidelity_scores_are_named_after_the_extractor_and_calibrated():
    rng = np.random.default_rng(0)
    real = [Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)) for _ in range(20)]
    dark = [Image.fromarray(np.asarray(image) // 4) for image in real]

    class Pixels:
        def encode_images(self, images):
            return np.stack([np.asarray(image, dtype=float).reshape(-1, 3).mean(0) for image in images])

    record = Record()
    measure.measure_fidelity(record, "pixels", Pixels(), [str(number) for number in range(20)], dark, real, real, 50, 0)
    assert record.scores["fd_pixels"] > 1000 > record.calibration["fd_pixels_real_halves"] > record.calibration["fd_pixels_reconstructions"]
    assert record.scores["kd_pixels"] > record.calibration["kd_pixels_real_halves"]
    assert record.scores["coverage_pixels"] == 0
    assert record.calibration["coverage_pixels_reconstructions"] == 1


@pytest.mark.parametrize("count", range(8, 14))
def test_any_number_of_images_is_measured(count):
    images = [Image.new("RGB", (8, 8), (number, 2 * number, 0)) for number in range(count)]

    class Pixels:
        def encode_images(self, images):
            return np.stack([np.asarray(image, dtype=float).reshape(-1, 3).mean(0) for image in images])

    record = Record()
    measure.measure_fidelity(record, "pixels", Pixels(), [str(number) for number in range(count)], images, images, images, 10, 0)
    assert ("coverage_pixels" in record.scores) == (count // 2 > 5)


def test_every_score_lies_in_its_interval():
    rng = np.random.default_rng(1)
    real = [Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)) for _ in range(40)]
    near = [Image.fromarray(np.clip(np.asarray(image).astype(int) + 3, 0, 255).astype(np.uint8)) for image in real]
    record, ids = Record(), [str(number) for number in range(40)]
    measure.measure_images(record, ColorEncoder(), ids, ["red", "blue"] * 20, near, real, real, 100, 0)
    caption = "a small red circle on a white background"
    measure.measure_composition(record, ids, [caption] * 40, near, real, real, 100, 0)
    questions, truths = ["What color is it?"] * 4 + ["How many?"] * 4, [["red"], ["2"]] * 4
    measure.measure_answers(
        record, questions, ["red"] * 8, None, truths, ["a#0", "a#1", "b#0", "b#1", "c#0", "c#1", "d#0", "d#1"], Counter(), 100, 0
    )
    assert record.scores.keys() - record.intervals.keys() == {"composition/prompts"}
    for name, (low, high) in record.intervals.items():
        assert low <= record.scores[name] <= high, name


def test_values_of_a_group_are_resampled_together():
    values = [0.0] * 10 + [1.0] * 10
    low, high = bootstrap(values, 2000, 0)
    wide_low, wide_high = bootstrap(values, 2000, 0, ["a"] * 5 + ["b"] * 5 + ["c"] * 5 + ["d"] * 5)
    assert wide_high - wide_low > 1.5 * (high - low)
    assert bootstrap(values, 50, 0, [str(n) for n in range(20)]) != (0.0, 1.0)


def test_captions_that_describe_no_scene_have_no_composition_score():
    record, images = Record(), [flat(9, 9, 9)] * 2
    measure.measure_composition(record, ["a", "b"], ["a photo of a dog"] * 2, images, images, images, 10, 0)
    assert "composition" not in record.scores


@pytest.mark.parametrize(("successes", "count"), [(0, 8), (8, 8), (1, 20), (37, 50)])
def test_the_interval_of_a_share_is_wilsons_and_never_empty(successes, count):
    from scipy.stats import binomtest

    record = Record()
    record.add("share", {str(number): float(number < successes) for number in range(count)}, 100, 0, share=True)
    expected = binomtest(successes, count).proportion_ci(method="wilson")
    assert record.intervals["share"] == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert np.diff(wilson(successes / count, count)) > 0.04


def test_questions_about_one_image_count_as_one_for_the_interval_of_a_share():
    record = Record()
    for name, keys in (("one", [f"a{number}" for number in range(20)]), ("two", [f"a{number // 2}#{number % 2}" for number in range(20)])):
        record.add(name, dict.fromkeys(keys, 1.0), 100, 0, share=True)
    assert record.intervals["two"] == wilson(1.0, 10) and record.intervals["one"] == wilson(1.0, 20)


def test_a_score_that_is_no_share_has_no_wilson_interval():
    """CIDEr is 0 for captions that share no word with the references, and can be 10."""
    record = Record()
    record.add("cider", {"a": 0.0, "b": 0.0}, 100, 0)
    assert record.intervals["cider"] == (0.0, 0.0)


def test_a_paired_difference_leaves_out_what_both_models_share():
    rng = np.random.default_rng(0)
    difficulty, effect = rng.normal(size=400), rng.normal(0.1, 0.05, size=400)
    old = keyed([f"r{number}" for number in range(400)], difficulty)
    new = keyed([f"r{number}" for number in range(400)], difficulty + effect)
    differences = paired_differences(new, old, 2000, 0)
    assert differences.mean() == pytest.approx(effect.mean(), abs=1e-3)
    assert differences.std() == pytest.approx(effect.std() / 20, rel=0.1)
    assert differences.std() < difficulty.std() / 20 / 10


def test_questions_about_one_record_are_resampled_together_in_pairs_too():
    together = {f"r{number // 10}#{number % 10}": float(number // 10 % 2) for number in range(100)}
    apart = {f"r{number}": float(number // 10 % 2) for number in range(100)}
    spread = [np.std(paired_differences(found, dict.fromkeys(found, 0.0), 2000, 0)) for found in (together, apart)]
    assert spread[0] > 2.5 * spread[1]


def test_a_key_that_occurs_twice_is_refused():
    with pytest.raises(ValueError, match="occurs twice"):
        keyed(["a", "a"], [0.0, 1.0])


def shuffled(image, rng):
    """Its tiles of 8 x 8 pixels in another order."""
    tiles = image.reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, 8, 8, 3)[rng.permutation(64)]
    return tiles.reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, 64, 3)


BROKEN = {
    "noise": lambda image, rng: rng.integers(256, size=image.shape, dtype=np.uint8),
    "black": lambda image, rng: np.zeros_like(image),
    "shuffled": shuffled,
    "blurred": lambda image, rng: ndimage.gaussian_filter(image, (6, 6, 0)),
}


def test_every_score_of_images_moves_when_the_pictures_are_broken(monkeypatch):
    """The encoder is a fixed one of mean colors and edges; a text has those of the picture that it describes."""
    monkeypatch.setattr(measure, "DISTANCE_RESAMPLES", 2)
    rng = np.random.default_rng(0)
    scenes = [sample_scene(random.Random(number), 3, 8, 0.0) for number in range(60)]
    prompts = [text.caption(scene, random.Random(number)) for number, scene in enumerate(scenes)]
    real = [Image.fromarray(scene.render(64)) for scene in scenes]

    class Seen:
        def encode_images(self, images):
            pixels = np.stack([np.asarray(image, dtype=float) for image in images])
            edges = np.abs(np.diff(pixels, axis=1))[:, :, :63] + np.abs(np.diff(pixels, axis=2))[:, :63]
            cells = [
                part.reshape(len(images), 9, 7, 9, 7, 3).mean((2, 4)).reshape(len(images), -1)
                for part in (pixels[:, :63, :63] - 127, edges)
            ]
            return np.concatenate(cells, axis=1) / 20

        def encode_texts(self, texts):
            return self.encode_images([real[prompts.index(caption)] for caption in texts])

    def measured(images):
        record, ids = Record(), [str(number) for number in range(60)]
        measure.measure_images(record, Seen(), ids, prompts, images, real, real, 50, 0)
        measure.measure_composition(record, ids, prompts, images, real, real, 50, 0)
        return record.scores

    good = measured(real)
    assert good["composition"] == 1
    lower_is_better = {"fd_encoder", "kd_encoder"}
    for kind, broken in BROKEN.items():
        bad = measured([Image.fromarray(broken(np.asarray(image), rng)) for image in real])
        assert good.keys() == bad.keys()
        # Without the parts of composition, as a blurred picture keeps its colors. To so coarse an encoder a picture that is blurred or
        # shuffled is still like its original; to a trained one it is less so.
        names = {name for name in good if "/" not in name} - ({"coverage_encoder"} if kind in ("blurred", "shuffled") else set())
        for name in names:
            worse = bad[name] > good[name] + 0.02 if name in lower_is_better else bad[name] < 0.95 * good[name]
            assert worse, (kind, name, good[name], bad[name])
