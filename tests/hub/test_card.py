from __future__ import annotations

import pytest
from huggingface_hub import DatasetCard, ModelCard

from diffusers_ext.hub import Licence
from diffusers_ext.hub.card import artifact_card
from diffusers_ext.hub.kinds import KINDS
from tests.hub.card_examples import BASE, COMMON, FACTS, VARIANTS, card_of

SECTIONS = ("Use it", None, "Results", "Intended use", "Out of scope", "Limits", "Licence", "Citation")
MODELS = [kind for kind in KINDS if kind != "pair_data_set"]


def headings(text: str) -> list[str]:
    return [line[3:] for line in text.splitlines() if line.startswith("## ")]


def test_every_card_has_all_sections_and_no_holes(subtests):
    for kind in KINDS:
        with subtests.test(kind=kind):
            for changes in (changes for varied, changes in VARIANTS if varied == kind):
                check_text(card_of(kind, **changes))


def check_text(card: ModelCard | DatasetCard) -> None:
    found = headings(card.text)
    assert found[:1] + [None] + found[2:] == list(SECTIONS)
    assert found[1] in ("Training", "How it was made")
    for hole in ("{{", "{%", "None", "Undefined", "\n\n\n", " ,", " .\n"):
        assert hole not in card.text.split("## Citation")[0]
    assert "With `diffusers_ext`" in card.text
    assert "Without `diffusers_ext`" in card.text
    fences = [line for line in card.text.splitlines() if line.startswith("```")]
    assert fences[-2:] == ["```bibtex", "```"]
    assert set(fences[:-2:2]) == {"```python"}
    assert set(fences[1::2]) == {"```"}


def test_every_header_is_what_the_hub_reads():
    for kind, changes in VARIANTS:
        card = card_of(kind, **changes)
        assert type(card) is (DatasetCard if kind == "pair_data_set" else ModelCard)
        again = type(card)(str(card))
        assert str(again) == str(card)
        assert again.data.to_dict() == card.data.to_dict()
        assert again.text == card.text


def test_the_header_of_a_model(subtests):
    for kind in MODELS:
        with subtests.test(kind=kind):
            data = ModelCard(str(card_of(kind))).data
            assert data.base_model == BASE
            assert data.base_model_relation == ("finetune" if kind == "subject_pipeline" else "adapter")
            assert (data.license, data.license_name) == ("other", "openrail++")
            assert data.license_link == "https://example.org/licence"
            assert data.library_name == "diffusers"
            assert "diffusers" in data.tags
            assert len(set(data.tags)) == len(data.tags)
            assert data.widget == [
                {"text": "a photo of sks dog", "output": {"url": "validation/dog 1.png"}},
                {"text": "a dog runs", "output": {"url": "clips/dog.mp4"}},
            ]
            if "instance_prompt" in FACTS[kind]:
                assert data.instance_prompt == FACTS[kind]["instance_prompt"]
            assert data.model_name == f"my-{kind}"
            task = KINDS[kind].pipeline_tag or "other"
            found = [
                (r.task_type, r.dataset_type, r.dataset_name, r.metric_type, r.metric_name, r.metric_value)
                for r in data.eval_results
            ]
            held_out = (task, "held-out-prompts", "held-out prompts")
            assert found == [
                (*held_out, "pixel-drift", "pixel drift", 0.01234),
                (*held_out, "win-rate", "win rate at scale 1", 0.75),
                (task, "dog-pictures", "dog pictures", "win-rate", "win rate", 1.0),
            ]


@pytest.mark.parametrize("kind", ["knowledge_edit", "null_space_lora"])
@pytest.mark.parametrize("pipeline", ["WanPipeline", "LTX2Pipeline"])
def test_a_lora_of_a_model_of_clips_is_one_of_text_to_video(kind, pipeline):
    card = card_of(kind, pipeline=pipeline)
    assert card.data.pipeline_tag == card.data.eval_results[0].task_type == "text-to-video"
    assert card.text.count(".frames[0]") == 2
    assert ".images[0]" not in card.text
    assert card_of(kind).data.pipeline_tag == "text-to-image"


def test_the_header_of_a_data_set_says_where_its_tables_are():
    data = card_of("pair_data_set").data.to_dict()
    assert data["configs"][0] == {
        "config_name": "pairs", "default": True, "data_files": "pairs/*.parquet",
    }  # fmt: skip
    assert data["configs"][1] == {"config_name": "rejected", "data_files": "rejected/*.parquet"}
    assert data["size_categories"] == ["1K<n<10K"]
    assert card_of("pair_data_set", num_pairs=999).data["size_categories"] == ["n<1K"]
    assert card_of("pair_data_set", num_pairs=10**8).data["size_categories"] == ["n>10M"]
    inner = card_of("pair_data_set", subfolder="inner/").data["configs"]
    assert inner[1]["data_files"] == "inner/rejected/*.parquet"


def test_all_facts_are_in_the_text(subtests):
    for kind in KINDS:
        with subtests.test(kind=kind):
            text = card_of(kind).text
            for expected in (
                "Six pictures of one dog.",
                "| learning\\_rate | 0.001 |\n| max\\_train\\_steps | 600 |",
                "| held-out prompts | pixel drift | 0.01234 | 5 seeds, 0.010 to 0.014 |",
                "| held-out prompts | win rate at scale 1 | 0.75 |  |",
                "| dog pictures | win rate | 1 |  |",
                "| a photo of sks dog | ![validation/dog 1.png](validation/dog%201.png) |",
                "| a dog runs | [clips/dog.mp4](clips/dog.mp4) |",
                "`diffusers_ext` 1.2.3",
                "[`openrail++`](https://example.org/licence)",
                "version = {1.2.3}",
            ):
                assert expected in text
            hidden = ("statistics", "any_size", "directions", "text_embed_dim", "latent_shape")
            for name, value in FACTS[kind].items():
                if name not in hidden:
                    for part in value if isinstance(value, list) else [value]:
                        shown = f"{part:,}" if isinstance(part, int) else str(part)
                        assert (shown if part != 2.36 else "2.4 MB") in text
            if kind in ("npnet", "golden_noise_model", "pair_data_set"):
                assert "4 x 128 x 96" in text


def test_what_is_empty_is_left_out_or_said():
    text = card_of("eraser", results=(), settings={}, widget=()).text
    assert "Nothing was measured for this card." in text
    assert "|" not in text
    card = card_of("eraser", results=(), widget=())
    assert card.data.eval_results is None
    assert "widget" not in card.data.to_dict()
    noteless = [result for result in COMMON["results"] if not result.notes]
    assert "notes" not in card_of("eraser", results=noteless).text


def test_a_base_model_that_is_not_on_the_hub_is_only_in_the_text():
    card = card_of("eraser", base="moving_digits")
    assert not {"base_model", "base_model_relation"} & card.data.to_dict().keys()
    assert "`moving_digits` is not on the Hub: put the path" in card.text
    assert "is not on the Hub" not in card_of("eraser").text


def test_plain_loras_do_not_claim_a_null_space():
    plain = card_of("null_space_lora", directions="plain")
    assert "null-space-lora" not in plain.data.tags
    assert "lora" in plain.data.tags
    assert "nothing protects other prompts" in plain.text
    assert "null-space-lora" in card_of("null_space_lora").data.tags


def test_a_folder_of_the_repository_is_in_all_ways_of_loading():
    for kind in KINDS:
        text = card_of(kind, subfolder="/inner/").text
        assert "inner" in text
        assert "//" not in text.replace("https://", "")
    assert 'subfolder="inner/statistics")' in card_of("null_space_lora", subfolder="inner").text
    pipeline = card_of("golden_noise_pipeline", subfolder="inner").text
    assert pipeline.count('snapshot_download("user/my-golden_noise_pipeline") + "/inner"') == 2


def test_an_unknown_kind_and_a_name_that_is_no_repository():
    with pytest.raises(ValueError, match=r"`kind` must be one of \['null_space_lora', .* got 'x'"):
        artifact_card("x", "user/name", **COMMON)
    for name in ("name", "a/b/c", "user/my name", None):
        with pytest.raises(ValueError, match="`repo_id` must be 'user/name', got"):
            artifact_card("eraser", name, **COMMON, **FACTS["eraser"])


def test_odd_words_stay_what_they_are():
    prompt = 'a "photo" of <sks>*`dog`*\n| x'
    card = card_of(
        "null_space_lora",
        instance_prompt=prompt,
        widget=[(prompt, "a.png")],
        settings={"a|b": "<c>_d"},
        licence=Licence("mit"),
    )
    assert ModelCard(str(card)).data.instance_prompt == prompt
    assert '> ``a "photo" of <sks>*`dog`* | x``' in card.text
    assert 'pipeline("a \\"photo\\" of <sks>*`dog`*\\n| x")' in card.text
    assert '| a "photo" of \\<sks\\>\\*\\`dog\\`\\* \\| x | ![a.png](a.png) |' in card.text
    assert "| a\\|b | \\<c\\>\\_d |" in card.text
    assert "shared under `mit`." in card.text
