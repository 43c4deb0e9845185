"""One interface for U-Nets and transformers, and the parts of a network that a selection means."""

import pytest
import torch
from torch import nn

from salun_core.diffusion.denoiser import Denoiser, require_finite
from salun_core.errors import ModelError, UsageError
from tests.support.tiny_diffusion import (
    batches,
    class_unet,
    digits_sets,
    flow_transformer,
    lab,
    pixart,
    text_table,
    text_unet,
)

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("kind", ["text", "class", "flow"])
def test_every_network_predicts_in_the_shape_of_its_input(kind):
    denoiser, task = lab(kind)
    batch, _ = batches(denoiser, task)
    with torch.no_grad():
        found = denoiser.predict(batch.noisy, batch.times, task.table.take(batch.condition))
        other = denoiser.predict(batch.noisy, batch.times, task.table.take(batch.condition + 1))
    assert found.shape == batch.noisy.shape
    assert not torch.equal(found, other)  # it listens to what it is told


def test_a_learned_variance_is_dropped():
    denoiser = pixart()
    batch, _ = batches(denoiser, digits_sets(text_table()))
    with torch.no_grad():
        found = denoiser.predict(batch.noisy, batch.times, text_table().take(batch.condition))
    assert found.shape[1] == 1


def test_the_network_is_called_as_in_diffusers():
    denoiser, task = lab("text")
    batch, _ = batches(denoiser, task)
    told = task.table.take(batch.condition)
    with torch.no_grad():
        direct = denoiser.network(batch.noisy, batch.times, encoder_hidden_states=told["encoder_hidden_states"]).sample
        assert torch.equal(denoiser.predict(batch.noisy, batch.times, told), direct)


def test_selections_of_a_text_network():
    denoiser = text_unet()
    names = [name for name, _ in denoiser.network.named_parameters()]
    cross = [name for name in names if ".attn2." in name]
    assert denoiser.selected("full") == names
    assert denoiser.selected("xattn") == cross
    assert denoiser.selected("selfattn") == [name for name in names if ".attn1." in name]
    outer = ("conv_out.", "conv_norm_out.", "time_embedding.")
    assert denoiser.selected("noxattn") == [n for n in names if n not in cross and not n.startswith(outer)]
    assert len(cross) == 4 * 5  # four layers: three projections, an output with its bias


def test_selections_of_a_class_conditional_network():
    denoiser = class_unet()
    attention = {name for name, _ in denoiser.network.named_parameters() if ".attentions." in name}
    assert set(denoiser.selected("selfattn")) == attention
    assert not [name for name in denoiser.selected("noxattn") if name.startswith(("conv_out", "time_embedding"))]
    with pytest.raises(UsageError, match="xattn is empty.*noxattn"):
        denoiser.selected("xattn")


def test_selections_of_a_joint_transformer_split_the_two_streams():
    denoiser = flow_transformer()
    cross, own = set(denoiser.selected("xattn")), set(denoiser.selected("selfattn"))
    assert cross
    assert own
    assert not cross & own
    assert all(".add_" in name or "to_add_out" in name for name in cross)


def test_cross_attention_layers_are_found_or_refused():
    assert len(text_unet().cross_attentions()) == 4
    assert len(pixart().cross_attentions()) == 2
    for denoiser in (class_unet(), flow_transformer()):
        with pytest.raises(UsageError, match="has no cross-attention"):
            denoiser.cross_attentions()


def test_unknown_networks_and_nan_are_refused():
    with pytest.raises(UsageError, match="denoiser"):
        Denoiser(nn.Linear(1, 1), text_unet().process)
    with pytest.raises(ModelError, match="weights are not finite"):
        require_finite("weights", torch.tensor([float("inf")]))


def test_the_class_embedding_of_another_model_is_put_into_a_copy():
    one, other = class_unet(0), class_unet(1)
    made = one.with_class_embedding_of(other)
    for name, parameter in made.network.named_parameters():
        source = other if name == "class_embedding.weight" else one
        assert torch.equal(parameter, source.network.get_parameter(name)), name
    assert not torch.equal(one.network.class_embedding.weight, other.network.class_embedding.weight)
    assert text_unet().with_class_embedding_of(text_unet(1)) is None
