"""The model card: from melinoe.json alone, as the hub reads it; what a person wrote stays."""

from xml.etree import ElementTree

import pytest

from melinoe.checkpoint import read_metadata, write_metadata
from melinoe.errors import CheckpointError, OutputExistsError, WriteError
from melinoe.report.card import write_card


def test_a_card_holds_the_numbers_and_the_hub_reads_its_front_matter(copy):
    """The licence and tags as the hub's own library reads them; a cell as the file has it."""
    from huggingface_hub import ModelCard

    files = write_card(copy)
    card = ModelCard.load(copy / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "transformers"
    assert "mixture-of-experts" in card.data.tags and card.data.base_model is None
    outcome = read_metadata(copy)["outcome"]
    before = outcome["before"]["perplexity"]["words"]["perplexity"]["mean"]
    assert f"| words (in domain) | {before:.4g} " in card.text.replace(",", "")
    assert "transfers per token, LRU, 2 slots (trained for)" in card.text
    for file in files[1:]:
        assert f"]({file.name})" in card.text
        assert ElementTree.fromstring(file.read_text()).tag.endswith("svg")
    assert {file.name for file in copy.iterdir()} == {"melinoe.json", *(f.name for f in files)}


def test_a_card_written_again_is_the_same_and_keeps_what_a_person_wrote(copy):
    """Bytes equal, figures too; text below the last line and added front matter stay."""
    first = {file.name: file.read_bytes() for file in write_card(copy)}
    assert {file.name: file.read_bytes() for file in write_card(copy)} == first
    card = copy / "README.md"
    text = card.read_text().replace("license: mit\n", "license: mit\nthumbnail: me.png\n")
    card.write_text(text + "\nMy own words.\n")
    write_card(copy)
    again = card.read_text()
    assert again.endswith("My own words.\n") and again.count("My own words.") == 1
    assert "thumbnail: me.png" in again


@pytest.mark.usefixtures("words_alone")
def test_an_unknown_licence_is_said_and_a_persons_answer_kept(copy):
    """`unknown` is the hub's word; once somebody found out, that stands."""
    metadata = read_metadata(copy)
    write_metadata(copy, metadata | {"license": None})
    write_card(copy)
    card = copy / "README.md"
    assert "license: unknown\n" in card.read_text() and "No licence is known" in card.read_text()
    card.write_text(card.read_text().replace("license: unknown", "license: apache-2.0"))
    write_card(copy)
    assert "license: apache-2.0\n" in card.read_text()
    assert "No licence is known" not in card.read_text()


@pytest.mark.usefixtures("words_alone")
def test_a_hub_base_and_data_set_stand_in_the_front_matter(copy):
    """So that the hub links them; the configuration behind the colon is not part of the name."""
    from huggingface_hub import metadata_load

    about = {"base": "allenai/OLMoE-1B-7B-0924", "base_model": "allenai/OLMoE-1B-7B-0924"}
    data = {"source": "openai/gsm8k:main", "hub": True, "split": "train", "examples": 5}
    write_metadata(copy, {**read_metadata(copy), **about, "data": data})
    write_card(copy)
    header = metadata_load(copy / "README.md")
    assert header["base_model"] == about["base_model"]
    assert header["datasets"] == ["openai/gsm8k"]
    assert "https://huggingface.co/allenai/OLMoE-1B-7B-0924" in (copy / "README.md").read_text()


def test_a_card_without_measurements_says_so(copy):
    """And draws nothing; a plain run is called one."""
    write_metadata(copy, {"settings": {"lambda_cache": 0.0}, "log": [{"step": 3, "nll": 2.0}]})
    files = write_card(copy)
    text = files[0].read_text()
    assert [file.name for file in files] == ["README.md"]
    assert "Nothing was measured" in text and "on next tokens alone" in text


AIM = "fine-tuned with the aim of fewer such transfers"
PLAIN = "fine-tuned on next tokens alone"
WITHOUT = "fine-tuned without locality terms"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lambda_cache": 0.0, "lambda_rank": 0.0, "lambda_concentration": 0.3}, AIM),
        ({"lambda_cache": 0.0, "lambda_rank": 0.0}, PLAIN),
        ({"lambda_cache": 0.0, "lambda_rank": 0.1}, WITHOUT),
        ({"lambda_cache": 0.0, "lambda_replay": 10.0}, WITHOUT),
    ],
)
@pytest.mark.usefixtures("words_alone")
def test_a_card_says_what_the_model_was_trained_for(copy, settings, said):
    """The aim and no more: each term for locality is one."""
    write_metadata(copy, read_metadata(copy) | {"settings": settings})
    text = write_card(copy)[0].read_text()
    assert said in text
    assert ("(trained for)" in text) is (said == AIM)
    write_metadata(copy, {"settings": settings})
    text = write_card(copy)[0].read_text()
    assert "slots=SLOTS" in text and "slots=16" not in text


def test_a_card_that_cannot_be_written_or_read_is_said_in_a_sentence(copy):
    """A place that is taken by a directory; an earlier card that is no text."""
    (copy / "melinoe-locality.svg").mkdir()
    with pytest.raises(WriteError, match="cannot write"):
        write_card(copy)
    (copy / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        write_card(copy)


@pytest.mark.usefixtures("words_alone")
def test_a_foreign_readme_is_not_replaced_unless_told(copy):
    """Somebody wrote it."""
    (copy / "README.md").write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        write_card(copy)
    assert [file.name for file in copy.iterdir() if file.suffix == ".svg"] == []
    write_card(copy, overwrite=True)
    assert "mine" not in (copy / "README.md").read_text().split()


def test_no_metadata_and_a_broken_one_are_refused(tmp_path):
    """A card is written from melinoe.json alone."""
    with pytest.raises(CheckpointError, match="has no melinoe"):
        write_card(tmp_path)
    (tmp_path / "melinoe.json").write_text('{"outcome": {"examples": 3}}')
    with pytest.raises(CheckpointError, match="outcome has no 'prompts'"):
        write_card(tmp_path)
    with pytest.raises(CheckpointError, match="no directory"):
        write_card(tmp_path / "absent")
