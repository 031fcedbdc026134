"""The model card says where the text came from, how the model was trained and how good it is."""

import yaml

from sparselt_dist.config import Config
from sparselt_dist.data.manifest import Manifest, SourceEntry
from sparselt_dist.models.model_card import ModelFacts, model_card

FACTS = ModelFacts("CrammedBertForMaskedLM", "AutoModelForMaskedLM", "fill-mask", 1234567, "[MASK]", remote_code=True)
PROGRESS = {"step": 1200, "tokens": 9_830_400, "seconds": 301.4}


def _config() -> Config:
    return Config.model_validate(
        {"run": {"name": "night"}, "objective": {"name": "mlm", "mlm_probability": 0.25}, "budget": {"max_hours": 1.5}}
    )


def _manifest() -> Manifest:
    return Manifest(
        format="sparselt_dist.shards",
        format_version=1,
        kind="rows",
        sequence_length=128,
        dtype="uint16",
        samples=100,
        tokens=12800,
        vocab_size=8192,
        tokenizer_sha256="0",
        shards=(),
        sources=(SourceEntry("a|b", "CC0-1.0", 31, 4711),),
    )


def _card(manifest: Manifest | None, metrics: dict[str, float]) -> str:
    return model_card(_config(), manifest, FACTS, progress=PROGRESS, data_sha256="beef", metrics=metrics)


def test_front_matter_is_yaml_with_the_pipeline_and_the_objective() -> None:
    front = yaml.safe_load(_card(None, {}).split("---")[1])
    assert front["pipeline_tag"] == "fill-mask"
    assert front["tags"] == ["sparselt_dist", "mlm", "crammed-bert"]


def test_card_names_sources_licences_budget_and_results() -> None:
    card = _card(_manifest(), {"yardstick/masked_ce": 3.25, "eval/loss": 3.0, "train/loss": 2.0})
    for text in (
        "| a\\|b | CC0-1.0 | 31 | 4,711 |",
        "max_hours 1.5",
        '{"mlm_probability": 0.25}',
        "9,830,400",
        "1,200",
        "| `yardstick/masked_ce` | 3.2500 |",
        "| `eval/loss` | 3.0000 |",
        "trust_remote_code=True",
        "beef",
    ):
        assert text in card
    assert "train/loss" not in card


def test_card_says_what_it_does_not_know() -> None:
    card = _card(None, {})
    assert "sources are not listed here" in card
    assert "None were measured" in card
