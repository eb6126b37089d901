"""The laws of the PET modules on real pretrained weights: MiniLM, and its exact RoBERTa form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pretrained_checks import CASES, check_laws

from fedpet.backbone.pretrained import Backbone, load_backbone
from fedpet.config import BackboneConfig


@pytest.fixture(scope="module")
def minilm() -> Backbone:
    return load_backbone(BackboneConfig(), num_outputs=2)


@pytest.fixture(scope="module")
def roberta(minilm: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """MiniLM's weights in RoBERTa's classes, which have BERT's blocks and names of keys.

    RoBERTa counts positions from the padding's id + 1: one row of zeros goes before the table.
    """
    from transformers import RobertaConfig, RobertaModel

    bert = minilm.model.bert
    config = RobertaConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=513,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
        pad_token_id=0,
        bos_token_id=101,
        eos_token_id=102,
    )
    model = RobertaModel(config)
    weights = dict(bert.state_dict())
    table = "embeddings.position_embeddings.weight"
    weights[table] = torch.cat([torch.zeros(1, config.hidden_size), weights[table]])
    buffers = {key: value for key, value in model.state_dict().items() if "_ids" in key}
    model.load_state_dict({**weights, **buffers})
    folder: Path = tmp_path_factory.mktemp("roberta")
    model.save_pretrained(folder)
    return load_backbone(BackboneConfig(model=str(folder)), num_outputs=2)


def test_the_roberta_form_computes_what_minilm_does(minilm: Backbone, roberta: Backbone) -> None:
    ids = torch.randint(1000, 20000, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = minilm.model.bert(input_ids=ids).last_hidden_state
        assert torch.equal(roberta.model.roberta(input_ids=ids).last_hidden_state, wanted)
    assert type(roberta.model).__name__ == "RobertaForSequenceClassification"
    assert sum(p.numel() for p in roberta.model.parameters()) == 22_714_370


@pytest.mark.parametrize("names", CASES)
def test_the_laws_hold_on_the_real_minilm(minilm: Backbone, names: str) -> None:
    check_laws(minilm, names)


@pytest.mark.parametrize("names", CASES)
def test_the_laws_hold_on_its_exact_roberta_form(roberta: Backbone, names: str) -> None:
    check_laws(roberta, names)
