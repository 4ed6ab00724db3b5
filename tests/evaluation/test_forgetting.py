from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffusers_ext.evaluation.features import PixelFeatures, diversity, feature_drift, pixel_drift
from diffusers_ext.evaluation.forgetting import (
    ForgettingReport,
    KeptPair,
    PairedFigures,
    evaluate_forgetting,
    summarize,
)
from diffusers_ext.evaluation.rendering import Sampling, Shot, draw, image_seed, shots_of, to_images
from examples.digits.judge import DigitsJudge

ROWS = [
    {"group": "preserved", "prompt": "a |\nb", "images": 2, "pixel_drift": 0.25},
    {"group": "preserved", "prompt": "long_name", "images": 2, "pixel_drift": 0.75},
    {"group": "subject", "prompt": "sks", "images": 2, "pixel_drift": 0.5, "accuracy_base": 1 / 3},
]


def make_report(**changes) -> ForgettingReport:
    summary = {"preserved": summarize(ROWS[:2]), "subject": summarize(ROWS[2:])}
    distribution = {"preserved": {"mmd": {"tuned": 0.5, "floor": -0.125}}}
    return ForgettingReport({"seed": 0}, 0.0, ROWS, summary, distribution, **changes)


def test_a_summary_holds_means_counts_and_the_worst_prompt():
    found = summarize(ROWS[:2])
    assert found == {"prompts": 2, "images": 4, "pixel_drift": 0.5, "worst_pixel_drift": 0.75}


def test_json_gives_the_same_report_back(tmp_path):
    report = make_report(pairs=[KeptPair("subject", "sks", *[Image.new("RGB", (4, 4))] * 2)])
    report.to_json(tmp_path / "new" / "report.json")
    read = ForgettingReport.from_json(tmp_path / "new" / "report.json")
    assert read == report
    assert read.pairs == []
    assert json.loads((tmp_path / "new" / "report.json").read_text())["drift_floor"] == 0


def test_a_figure_that_is_not_finite_is_not_written(tmp_path):
    report = make_report()
    report.drift_floor = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.to_json(tmp_path / "report.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", r"report\.json must hold"), ("{}", "must hold .*'drift_floor'.* got something else")],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        ForgettingReport.from_json(tmp_path / "report.json")


def test_tables_are_markdown():
    lines = make_report().to_table().splitlines()
    assert lines[:2] == [
        "| group | prompts | images | pixel drift | worst pixel drift | accuracy base |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    assert lines[2] == "| preserved | 2 | 4 | 0.5 | 0.75 | - |"
    assert lines[3] == "| subject | 1 | 2 | 0.5 | 0.5 | 0.3333 |"
    assert "| preserved | mmd | 0.5 | -0.125 |" in lines
    assert "| preserved | a \\| b | 2 | 0.25 | - |" in lines
    assert "| preserved | long_name | 2 | 0.75 | - |" in lines
    short = make_report().to_table(per_prompt=False)
    assert "sks" not in short
    assert "pixel drift 0." in short


def test_the_sheet_has_a_row_per_prompt(tmp_path):
    red, blue = (Image.new("RGB", (32, 32), color) for color in ("#c80000", "#0000c8"))
    pairs = [KeptPair("preserved", row["prompt"], red, blue) for row in ROWS[:2] for _ in range(2)]
    make_report(pairs=pairs).picture_sheet(tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        colors = {color: number for number, color in sheet.getcolors(2**16)}
    assert colors[200, 0, 0] == colors[0, 0, 200] == 4 * 96 * 96


def test_a_report_without_pictures_draws_no_sheet(tmp_path):
    with pytest.raises(ValueError, match="`pairs` must hold pictures to draw a sheet, got none"):
        make_report().picture_sheet(tmp_path / "sheet.png")


PROMPTS, HELD_OUT = ["a red seven", "a blue one"], ["a green two"]
SUBJECT = ["a photo of the sks glyph"]
QUICK = {"num_inference_steps": 2, "guidance_scale": 3.0, "num_images_per_prompt": 3, "show_progress": False}


def bright(images: list[Image.Image], prompts: list[str]) -> np.ndarray:
    assert len(images) == len(prompts)
    return np.array([np.asarray(image)[..., 0].mean() > 127 for image in images])


def evaluate(base, tuned=None, prompts=PROMPTS, **changes):
    return evaluate_forgetting(base, tuned, prompts, **{**QUICK, **changes})


def test_figures_equal_those_of_pictures_drawn_by_hand(pipeline, tuned):
    report = evaluate(tuned, judge=bright, held_out_prompts=HELD_OUT)
    assert [row["prompt"] for row in report.rows] == PROMPTS + HELD_OUT
    assert [row["group"] for row in report.rows] == ["preserved", "preserved", "held_out"]
    shots = [Shot("a blue one", i, image_seed(0, "a blue one", i)) for i in range(3)]
    base, changed = (draw(p, shots, Sampling(2, 3.0)) for p in (pipeline, tuned))
    drift = (base - changed).abs().mean().item()
    assert report.rows[1]["pixel_drift"] == pytest.approx(drift, rel=1e-4)
    assert drift > 1e-3
    for side, pictures in (("base", base), ("tuned", changed)):
        accuracy = bright(to_images(pictures), [""] * 3).mean()
        assert report.rows[1][f"accuracy_{side}"] == pytest.approx(accuracy)
    means = [row["pixel_drift"] for row in report.rows[:2]]
    assert report.summary["preserved"]["pixel_drift"] == pytest.approx(np.mean(means))
    assert report.summary["preserved"]["images"] == 6
    assert report.drift_floor == 0
    assert report.settings["adapters"] == ["subject"]
    assert report.settings["tuned"] is None


def test_figures_do_not_depend_on_the_batch_or_on_other_prompts(tuned):
    full = evaluate(tuned, features=PixelFeatures(), batch_size=64)
    for report in (
        evaluate(tuned, features=PixelFeatures(), batch_size=1),
        evaluate(tuned, features=PixelFeatures(), batch_size=4),
        evaluate(tuned, features=PixelFeatures(), prompts=[PROMPTS[1]]),
    ):
        for name in ("pixel_drift", "feature_drift", "diversity_tuned"):
            assert report.rows[-1][name] == pytest.approx(full.rows[1][name], rel=1e-3), name


def test_two_pipelines_and_one_with_a_lora_give_one_report(pipeline, tuned):
    one = evaluate(tuned, features=PixelFeatures(), judge=bright)
    two = evaluate(pipeline, tuned, features=PixelFeatures(), judge=bright)
    assert one.rows == two.rows
    assert one.summary == two.summary


def test_the_subject_is_measured_on_both_sides(tuned):
    subject_images = [Image.new("RGB", (32, 32), "white")]
    report = evaluate(
        tuned,
        subject_prompts=SUBJECT,
        subject_images=subject_images,
        features=PixelFeatures(),
        judge=bright,
        subject_judge=lambda images, prompts: [True] * len(images),
        scorer=lambda images, prompts: torch.arange(float(len(images))),
    )
    assert report.rows[2]["group"] == "subject"
    assert report.summary["subject"]["accuracy_tuned"] == 1
    assert report.summary["preserved"]["accuracy_tuned"] < 1
    for group in ("preserved", "subject"):
        assert 0 < report.summary[group]["subject_similarity_base"] <= 1
        assert {"score_base", "feature_drift"} <= report.summary[group].keys()


def test_distributions_come_with_the_floor_of_another_seed_set(pipeline, tuned):
    report = evaluate(tuned, features=PixelFeatures(), distribution=True, subject_prompts=SUBJECT)
    assert list(report.distribution) == ["preserved"]
    figure = report.distribution["preserved"]["frechet_distance"]
    assert figure["floor"] > 0
    assert figure["tuned"] != figure["floor"]
    same = evaluate(pipeline, tuned, features=PixelFeatures(), distribution=True)
    assert same.distribution == report.distribution


def test_a_tuning_without_effect_is_exactly_zero_and_logged(tuned, caplog):
    for name, parameter in tuned.unet.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    with caplog.at_level(logging.WARNING, "diffusers_ext"):
        report = evaluate(tuned, features=PixelFeatures(), distribution=True)
    assert "drew exactly what the base drew" in caplog.text
    assert report.summary["preserved"]["pixel_drift"] == 0
    assert report.summary["preserved"]["feature_drift"] == 0
    assert all(f["tuned"] == f["floor"] for f in report.distribution["preserved"].values())


def test_a_tuning_with_an_effect_is_not_logged(tuned, caplog):
    with caplog.at_level(logging.WARNING, "diffusers_ext"):
        evaluate(tuned)
    assert not caplog.records


def test_an_exception_in_the_judge_leaves_the_pipeline_as_it_was(tuned, picture):
    drawn, scheduler = picture(), tuned.scheduler
    trainable = [p.requires_grad for p in tuned.unet.parameters()]
    tuned.unet.train()

    def broken(images, prompts):
        raise RuntimeError("the judge is out")

    with pytest.raises(RuntimeError, match="the judge is out"):
        evaluate(tuned, judge=broken)
    assert tuned.unet.training
    tuned.unet.eval()
    assert torch.equal(picture(), drawn)
    assert tuned.scheduler is scheduler
    assert tuned._progress_bar_config == {"desc": "mine", "disable": True}
    assert [p.requires_grad for p in tuned.unet.parameters()] == trainable


def test_the_digits_judge_plugs_in(tuned):
    report = evaluate(tuned, judge=DigitsJudge().correct, num_images_per_prompt=1)
    assert report.summary["preserved"]["accuracy_base"] in (0, 0.5, 1)


def test_the_progress_bar_counts_pairs(tuned, capsys):
    evaluate(tuned, show_progress=True)
    assert "6/6" in capsys.readouterr().err
    evaluate(tuned)
    assert capsys.readouterr().err == ""


def test_the_report_keeps_pairs_of_the_first_prompts(tuned, tmp_path):
    report = evaluate(tuned, held_out_prompts=HELD_OUT, sheet_prompts=1)
    assert [pair.prompt for pair in report.pairs] == [PROMPTS[0]] * 2 + HELD_OUT * 2
    report.picture_sheet(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 96
    with pytest.raises(ValueError, match="got none"):
        evaluate(tuned, sheet_prompts=0).picture_sheet(tmp_path / "other.png")


def test_pipelines_with_pictures_of_two_sizes_are_refused(pipeline, tuned):
    tuned.unet.register_to_config(sample_size=4)
    with pytest.raises(ValueError, match=r"one size, got \(3, 32, 32\) and \(3, 16, 16\)"):
        evaluate(pipeline, tuned)
    assert evaluate(pipeline, tuned, height=16, width=16).drift_floor == 0


def test_weights_that_are_not_finite_are_refused(tuned, picture):
    with torch.no_grad():
        next(p for n, p in tuned.unet.named_parameters() if "lora_B" in n).fill_(torch.nan)
    with pytest.raises(ValueError, match="must draw finite pictures, got NaN .* 'a red seven'"):
        evaluate(tuned)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "`prompts` must be a non-empty list of strings"),
        ({"prompts": "a red seven"}, "`prompts` must be a list of prompts, got the string"),
        ({"subject_prompts": [3]}, "`subject_prompts` must be a non-empty list of strings"),
        ({"held_out_prompts": PROMPTS}, r"must not be among `prompts`, got \['a red seven'"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"subject_judge": bright}, "`subject_prompts` must be given for a `subject_judge`"),
        ({"subject_images": []}, "`features` must be given to compare with `subject_images`"),
        ({"subject_images": [], "features": PixelFeatures()}, "`images` must be a non-empty list of PIL images"),
        ({"distribution": True}, "`features` must be given for `distribution=True`"),
        (
            {"distribution": True, "features": PixelFeatures(), "num_images_per_prompt": 2},
            "`distribution` must rest on more than 5 pictures per group, got 4 for preserved",
        ),
        ({"judge": lambda images, prompts: [1.0]}, "`judge` must give one finite bool per image"),
    ],
)
def test_bad_input_is_refused(tuned, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tuned, **changes)


def test_a_pipeline_without_a_lora_needs_a_second_one(pipeline):
    with pytest.raises(ValueError, match="`base` must carry an active adapter"):
        evaluate(pipeline)


def pixels(count: int, seed: int, size: int = 4) -> torch.Tensor:
    levels = torch.randint(0, 256, (count, 3, size, size), generator=torch.manual_seed(seed))
    return levels / 255


def test_pixel_drift_is_the_mean_absolute_difference():
    base, tuned = pixels(3, 0), pixels(3, 1)
    expected = [np.abs(b - t).mean() for b, t in zip(base.numpy(), tuned.numpy(), strict=True)]
    assert pixel_drift(base, tuned).tolist() == pytest.approx(expected, rel=1e-5)
    assert pixel_drift(base, base).tolist() == [0, 0, 0]
    assert pixel_drift(torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)).item() == 1


def test_rows_hold_the_means_of_each_prompt():
    shots = shots_of(["a", "b"], 3, seed=0)
    base, tuned = pixels(6, 0), pixels(6, 1)
    features, subject = PixelFeatures(), F.normalize(torch.rand(2, 48), dim=1)
    figures = PairedFigures(
        "preserved",
        judge=lambda images, prompts: np.array([p == "a" for p in prompts]),
        scorer=lambda images, prompts: torch.tensor([i.getpixel((0, 0))[0] for i in images]),
        features=features,
        subject=subject,
    )
    for start in (0, 4):  # the second batch continues prompt "b"
        part = slice(start, start + 4)
        figures.add(shots[part], base[part], tuned[part])
    first, second = figures.rows()
    assert (second["group"], second["prompt"], second["images"]) == ("preserved", "b", 3)
    assert (first["accuracy_base"], second["accuracy_tuned"]) == (1, 0)
    assert second["score_tuned"] == pytest.approx(255 * tuned[3:, 0, 0, 0].mean().item())
    assert second["pixel_drift"] == pytest.approx(pixel_drift(base, tuned)[3:].mean().item())
    flat = {side: x.permute(0, 2, 3, 1).flatten(1) for side, x in (("b", base), ("t", tuned))}
    drift = feature_drift(flat["b"], flat["t"])
    assert second["feature_drift"] == pytest.approx(drift[3:].mean().item())
    cosines = F.cosine_similarity(flat["t"][3:, None], subject[None], dim=2)
    assert second["subject_similarity_tuned"] == pytest.approx(cosines.mean().item(), rel=1e-5)
    assert second["diversity_base"] == pytest.approx(diversity(flat["b"][3:]))
    assert torch.allclose(figures.all_features("tuned"), flat["t"])


def test_only_what_has_an_instrument_is_measured():
    figures = PairedFigures("subject")
    figures.add(shots_of(["a"], 2, 0), pixels(2, 0), pixels(2, 1))
    (row,) = figures.rows()
    assert list(row) == ["group", "prompt", "images", "pixel_drift"]


def test_one_picture_has_no_diversity():
    figures = PairedFigures("subject", features=PixelFeatures())
    figures.add(shots_of(["a"], 1, 0), pixels(1, 0), pixels(1, 1))
    assert "diversity_base" not in figures.rows()[0]


def test_two_small_pairs_are_kept_for_the_first_prompts():
    figures = PairedFigures("preserved", sheet_prompts=2)
    shots = shots_of(["a", "b", "c"], 3, 0)
    base = pixels(9, 0, size=300)
    figures.add(shots[:5], base[:5], base[:5])
    figures.add(shots[5:], base[5:], base[5:])
    assert [pair.prompt for pair in figures.pairs] == ["a", "a", "b", "b"]
    assert figures.pairs[3].base.size == (256, 256)
    assert not PairedFigures("preserved", sheet_prompts=0).pairs


@pytest.mark.parametrize(
    "verdicts", [[True], [0.5, 1.0], torch.tensor([[True], [True]]), np.array([1, 0]), [None, True]]
)
def test_a_judge_must_give_one_bool_per_picture(verdicts):
    figures = PairedFigures("preserved", judge=lambda images, prompts: verdicts)
    with pytest.raises(ValueError, match=r"`judge` must give one finite bool per image \(2\)"):
        figures.add(shots_of(["a"], 2, 0), pixels(2, 0), pixels(2, 1))


@pytest.mark.parametrize("scores", [torch.tensor([1.0, torch.nan]), ["a", "b"], 3.0, [True, False]])
def test_a_scorer_must_give_one_finite_number_per_picture(scores):
    figures = PairedFigures("preserved", scorer=lambda images, prompts: scores)
    with pytest.raises(ValueError, match=r"`scorer` must give one finite number per image \(2\)"):
        figures.add(shots_of(["a"], 2, 0), pixels(2, 0), pixels(2, 1))


@pytest.mark.parametrize("found", [torch.zeros(3, 4), torch.zeros(2), torch.tensor([[0.0, 1], [torch.nan, 0]])])
def test_features_must_be_one_finite_row_per_picture(found):
    class Broken:
        def extract(self, images):
            return found

    figures = PairedFigures("preserved", features=Broken())
    with pytest.raises(ValueError, match=r"must give finite features \(images, dim\) for 2 images"):
        figures.add(shots_of(["a"], 2, 0), pixels(2, 0), pixels(2, 1))


def test_pictures_of_two_sizes_are_refused():
    figures = PairedFigures("preserved")
    with pytest.raises(ValueError, match=r"pictures of one size, got \(3, 4, 4\) and \(3, 8, 8\)"):
        figures.add([Shot("a", 0, 0)], pixels(1, 0), pixels(1, 0, size=8))
