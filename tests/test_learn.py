"""What the modes make of the keys of a recipe, seen from within the model that learns."""

import pytest
import torch
from timm.layers.patch_dropout import PatchDropout

from vitft import learn, model, train
from vitft.errors import RecipeError
from vitft.prepare import prepare

PATCHES = 16  # of the tiny photographs: 32 px in patches of 8


class Tokens:
    """How many tokens reach the last block, with gradients and without."""

    def __init__(self, net):
        self.training, self.scoring = set(), set()
        inner = net.blocks[-1].norm1
        inner.register_forward_pre_hook(self.seen)

    def seen(self, module, args):
        (self.training if torch.is_grad_enabled() else self.scoring).add(args[0].shape[1])


@pytest.mark.parametrize("override", ["train.blocks=null", "train.blocks=1"])
def test_patches_are_left_out_in_training_and_never_in_validation(tiny_recipe, override):
    p = prepare(tiny_recipe("full", "train.patch_drop=0.5", override))
    tokens = Tokens(p.net)
    learn.learn(p, learn.Hooks())
    assert tokens.training == {1 + PATCHES // 2}
    assert tokens.scoring == {1 + PATCHES}


def test_patch_drop_works_on_timms_own_vit(tiny_recipe):
    p = prepare(tiny_recipe("full", "model.name=vit_tiny_patch16_224", "train.patch_drop=0.25"))
    tokens = Tokens(p.net)
    learn.learn(p, learn.Hooks())
    assert tokens.training == {1 + 3 * PATCHES // 4}


def test_a_model_without_patches_to_leave_out_is_refused(tiny_recipe):
    spec = ("model.name=resnet10t", "model.options={}", "train.patch_drop=0.5")
    p = prepare(tiny_recipe("full", *spec))
    text = "model.patch_drop.*train.patch_drop is 0.5, ResNet cannot leave out patches"
    with pytest.raises(RecipeError, match=text) as e:
        learn.learn(p, learn.Hooks())
    assert "set train.patch_drop: 0" in str(e.value)


def test_patches_can_be_put_back(tiny_recipe):
    net = prepare(tiny_recipe("full")).net
    model.drop_patches(net, 0.5)
    train.set_train_mode(net.requires_grad_(False))
    assert isinstance(net.patch_drop, PatchDropout)
    assert net.patch_drop.training
    model.drop_patches(net, 0.0)
    assert not isinstance(net.patch_drop, PatchDropout)
