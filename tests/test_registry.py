"""Models by name."""

import pytest

import golden
from vitpyramid import create_model, list_models

OURS = {"regnety_micro", "pvt_micro", "pit_micro", "t2t_vit_micro", "rest_micro", "deit_micro"}


def test_every_published_network_is_there():
    """Those of the golden manifest, the convolution token module of T2T-ViT's Table 7, and the micro networks."""
    assert set(list_models()) == set(golden.manifest()) | {"t2t_vit_c_14", "regnety_160"} | OURS
    assert list_models("pit_b") == ["pit_b", "pit_b_distilled"]


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match="unknown model 'pvt_smal'.*pvt_small"):
        create_model("pvt_smal")
    with pytest.raises(TypeError, match="pvt_tiny has no option 'patch'.*num_classes"):
        create_model("pvt_tiny", patch=4)
