from __future__ import annotations

import pytest
import torch
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model

from diffusers_ext.hub import Licence, Measured
from diffusers_ext.hub.card import find_generated, is_automatic, keep_owner_words, mark_generated, without_marks
from tests.hub.card_examples import BASE, FACTS, card_of

OLD = """---
language: en
license: apache-2.0
pipeline_tag: image-to-image
thumbnail: owner.png
library_name: peft
base_model: elsewhere/other
tags:
- my-tag
- lora
my_key: [1, 2]
widget:
- text: old
  output:
    url: old.png
---
# My dog

He is a good dog.
"""


def joined(new: ModelCard | DatasetCard, old_text: str | None) -> ModelCard | DatasetCard:
    """Joined twice: a second upload of the same changes nothing; nor do the cards that go in."""
    before = str(new)
    card = keep_owner_words(new, old_text)
    assert str(keep_owner_words(new, str(card))) == str(card)
    assert str(type(card)(str(card))) == str(card)
    assert str(new) == before
    return card


def body(words: str) -> str:
    return f"---\nmy_key: 1\n---\n{words}"


def test_without_an_old_card_the_new_one_stays():
    for new in map(card_of, FACTS):
        for old_text in (None, "", " \n", str(new)):
            assert str(joined(new, old_text)) == str(new)


def test_the_generated_part_is_renewed_where_it_stands():
    old = card_of("eraser", trained_on="Old prompts.")
    old.text = f"\nabove, *mine*\n{old.text}\nbelow\n\n  mine too  \n"
    new = card_of("eraser", trained_on="New prompts.")
    text = joined(new, str(old)).text
    assert text.startswith("\nabove, *mine*\n\n<!-- diffusers_ext:begin")
    assert text.endswith("<!-- diffusers_ext:end -->\n\nbelow\n\n  mine too  \n")
    assert "New prompts." in text
    assert "Old prompts." not in text
    assert text.count("## Limits") == 1


def test_each_subfolder_has_a_part_of_its_own():
    card = joined(card_of("eraser", trained_on="Of the root."), "Mine.\n")
    for words in ("Old words.", "New words."):
        for subfolder in ("a b", "c--/d"):
            new = card_of("eraser", trained_on=words, subfolder=subfolder)
            text = str(joined(new, str(card)))
            card = ModelCard(text.rstrip() + "\n\nMine, too.\n")
    text = card.text
    assert text.count("diffusers_ext:begin") == text.count("diffusers_ext:end") == 3
    assert text.count("Of the root.") == text.count("Mine.") == 1
    assert (text.count("New words."), text.count("Old words."), text.count("Mine, ")) == (2, 0, 4)
    edited = str(card).replace("New words.", "Words of the owner.", 1)
    text = joined(card_of("eraser", trained_on="Newest.", subfolder="a b"), edited).text
    assert (text.count("Words of the owner."), text.count("New words.")) == (1, 1)
    assert text.count("diffusers_ext:begin") == 3


def test_what_the_owner_edited_inside_stays_above_the_new_part():
    old = str(card_of("eraser", trained_on="Old prompts.")).replace("Old prompts.", "Mine.")
    new = card_of("eraser", trained_on="New prompts.")
    card = joined(new, old)
    mine, _, ours = card.text.partition("<!-- diffusers_ext:begin")
    assert "Mine." in mine
    assert "<!--" not in mine
    assert "New prompts." in ours
    assert "Mine." not in ours
    # And with a newer one: only our part changes.
    newer = joined(card_of("eraser", trained_on="Newer prompts."), str(card))
    assert newer.text.startswith(mine)
    assert newer.text.count("## Limits") == 2
    assert "New prompts." not in newer.text


@pytest.mark.parametrize("mark", ["<!-- diffusers_ext:end -->", "<!-- diffusers_ext:begin"])
def test_a_lost_mark_makes_the_old_words_the_owners(mark):
    old = str(card_of("eraser", trained_on="Old prompts.")).replace(mark, "")
    card = joined(card_of("eraser", trained_on="New prompts."), old)
    assert card.text.count("diffusers_ext:begin") == card.text.count("diffusers_ext:end") == 1
    mine, _, ours = card.text.partition("<!-- diffusers_ext:begin")
    assert "Old prompts." in mine
    assert "New prompts." in ours


def test_a_card_of_the_owners_keeps_its_body():
    card = joined(card_of("null_space_lora"), OLD)
    assert card.text.startswith("# My dog\n\nHe is a good dog.\n\n<!-- diffusers_ext:begin")
    assert card.text.endswith("<!-- diffusers_ext:end -->\n")


def test_a_body_without_a_header_is_kept_too():
    card = joined(card_of("null_space_lora"), "He is a good dog.\n\n---\n\nA line above.\n")
    assert card.text.startswith("He is a good dog.\n\n---\n\nA line above.\n\n<!-- diffusers_ext")
    assert card.data.base_model == BASE


AUTOMATIC = [
    "",
    "\n# Model Card for Model ID\n\n## Model Details\n",
    "<!-- Provide a quick summary of what the model is/does. -->\n\n\n",
    ModelCard.from_template(ModelCardData()).text,
    ModelCard.from_template(
        ModelCardData(),
        model_description="This is the model card of a 🧨 diffusers pipeline that has been pushed on "
        "the Hub. This model card has been automatically generated.",
    ).text,
    ModelCard.from_template(ModelCardData()).text + "\n### Framework versions\n\n- PEFT 0.21.2",
]


def test_automatic_bodies_are_replaced():
    for text in AUTOMATIC:
        new = card_of("eraser")
        assert joined(new, body(text)).text == new.text
        assert joined(new, body(f"{text}\nHe is a good dog.\n")).text.startswith(text.rstrip())


def test_the_header_belongs_to_both():
    data = joined(card_of("null_space_lora"), OLD).data.to_dict()
    new = card_of("null_space_lora").data.to_dict()
    for key in ("base_model", "base_model_relation", "library_name", "instance_prompt", "widget"):
        assert data[key] == new[key]
    assert (data["language"], data["thumbnail"], data["my_key"]) == ("en", "owner.png", [1, 2])
    assert data["pipeline_tag"] == "image-to-image"
    assert data["tags"] == ["my-tag", "lora", *(t for t in new["tags"] if t != "lora")]
    without = joined(card_of("null_space_lora", widget=()), OLD).data
    assert without.widget == [{"text": "old", "output": {"url": "old.png"}}]


def test_the_owners_licence_is_in_the_header_and_in_the_text():
    card = joined(card_of("null_space_lora"), OLD)
    assert card.data.license == "apache-2.0"
    assert card.data.license_name is None
    assert card.data.license_link is None
    assert "These files are shared under `apache-2.0`." in card.text
    assert "openrail" not in card.text
    two = joined(card_of("null_space_lora"), "---\nlicense: [mit, apache-2.0]\n---\n")
    assert two.data.license == ["mit", "apache-2.0"]
    assert "shared under `mit, apache-2.0`." in two.text


def test_a_licence_without_a_name_is_none():
    for old in ("license: other", "license: ''", "license: null"):
        card = joined(card_of("null_space_lora"), f"---\n{old}\n---\n")
        assert (card.data.license, card.data.license_name) == ("other", "openrail++")
    named = joined(card_of("null_space_lora"), "---\nlicense: other\nlicense_name: mine\n---\n")
    assert (named.data.license_name, named.data.license_link) == ("mine", None)


def test_figures_of_the_same_metric_are_renewed_and_others_stay():
    old = [Measured("digits", "drift", 0.5), Measured("digits", "win rate", 0.6)]
    new = [Measured("digits", "drift", 0.1), Measured("dogs", "drift", 0.2)]
    first = card_of("null_space_lora", results=old)
    card = joined(card_of("null_space_lora", results=new), str(first))
    found = {(r.dataset_name, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert found == {("digits", "drift"): 0.1, ("dogs", "drift"): 0.2, ("digits", "win rate"): 0.6}
    unmeasured = joined(card_of("null_space_lora", results=()), str(first))
    assert unmeasured.data.eval_results == first.data.eval_results


def test_data_sets_keep_other_tables_and_licences():
    old = DatasetCard.from_template(
        DatasetCardData(
            license="mit",
            task_categories=["other"],
            configs=[
                {"config_name": "mine", "data_files": "mine/*.csv"},
                {"config_name": "pairs", "data_files": "elsewhere/*"},
            ],
        ),
        template_str="---\n{{ card_data }}\n---\nMy noises.\n",
    )
    card = joined(card_of("pair_data_set"), str(old))
    assert isinstance(card, DatasetCard)
    tables = {config["config_name"]: config["data_files"] for config in card.data["configs"]}
    assert tables == {
        "pairs": "pairs/*.parquet", "rejected": "rejected/*.parquet", "mine": "mine/*.csv",
    }  # fmt: skip
    assert card.data["task_categories"] == ["other"]
    assert "shared under `mit`" in card.text
    assert card.text.startswith("My noises.\n\n<!--")


def test_the_card_of_an_earlier_version_is_replaced():
    earlier = "Noise pairs: `diffusers_ext.golden_noise.pairs.open_pairs` reads the noises, `datasets` the tables.\n"
    new = card_of("pair_data_set")
    assert joined(new, body(earlier)).text == new.text


def test_line_ends_and_byte_order_marks_of_windows():
    old = "\ufeff" + OLD.replace("\n", "\r\n")
    card = joined(card_of("null_space_lora"), old)
    text = str(card)
    assert text.count("\r\n") == text.count("\n")
    assert card.data.license == "apache-2.0"
    assert "# My dog\r\n\r\nHe is a good dog.\r\n" in card.text
    changed = card_of("null_space_lora", trained_on="Other\r\npictures.", licence=Licence("mit"))
    assert "Six pictures" not in joined(changed, text).text


def test_a_header_that_cannot_be_read_stops_the_upload():
    for header, message in [
        ("a: [1", "must be YAML, got: "),
        ("- a", "must hold keys and values, got a list"),
        ("model-index: 3", "`model-index` of the README.md on the Hub must be readable, got"),
        ("model-index:\n- name: x", "`model-index` of the README.md on the Hub must be readable"),
    ]:
        with pytest.raises(ValueError, match=message):
            keep_owner_words(card_of("eraser"), f"---\n{header}\n---\nHe is a good dog.\n")


def test_only_generated_cards_can_be_joined():
    with pytest.raises(ValueError, match="`new` must be a card of `artifact_card`"):
        keep_owner_words(ModelCard(OLD), OLD)


def test_generated_words_are_found_between_others():
    text = "above\n" + mark_generated("# Title\n\nwords") + "\nbelow\n"
    found = find_generated(text)
    assert (found.before, found.after, found.edited) == ("above\n", "\nbelow\n", False)
    assert without_marks(found.words).strip() == "# Title\n\nwords"
    assert text.count("<!-- diffusers_ext:") == 2


def test_an_edit_is_noticed():
    text = mark_generated("a long sentence")
    assert find_generated(text.replace("long", "short")).edited
    assert not find_generated(text.replace("\n<!-- diffusers_ext:end", "\n\n<!-- diffusers_ext:end")).edited


@pytest.mark.parametrize("broken", ["begin", "end"])
def test_a_part_without_one_of_its_marks_is_none(broken):
    text = mark_generated("words").replace(f"diffusers_ext:{broken}", "something else")
    assert find_generated(text) is None
    assert "diffusers_ext:" not in without_marks(text)


def test_a_lost_end_does_not_swallow_the_next_part():
    lost = mark_generated("first").replace("<!-- diffusers_ext:end -->", "")
    found = find_generated(f"{lost}\nowner\n" + mark_generated("second"))
    assert without_marks(found.words).strip() == "second"
    assert "owner" in found.before
    assert not found.edited


def test_marks_cannot_be_nested():
    with pytest.raises(ValueError, match="must not hold the marks of its generated part"):
        mark_generated(mark_generated("words"))


def test_the_card_that_peft_writes(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(4, 4))
    get_peft_model(network, LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    assert "PEFT" in text
    assert is_automatic(text)
    assert not is_automatic(text.replace("[More Information Needed]", "by me", 1))


def test_the_card_that_diffusers_writes_after_a_training():
    text = (
        "<!-- This model card has been generated automatically according to the information the "
        "training script had access to. You\nshould probably proofread and complete it, then remove "
        "this comment. -->\n\n\n## Intended uses & limitations\n\n#### How to use\n\n```python\n"
        "# TODO: add an example code snippet for running this diffusion pipeline\n```\n"
    )
    assert is_automatic(text)
    assert not is_automatic(text.replace("# TODO: add an", "pipeline = my"))


def test_words_of_people_are_not_automatic():
    assert is_automatic("\n \n")
    for words in ("My model.", "## Limits", "- PEFT is needed", "[TODO: x] and more"):
        assert not is_automatic(words)
