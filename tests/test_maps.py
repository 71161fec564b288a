"""Maps: against hand-computed answers, plain computations and planted places."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import vitft
from vitft import maps
from vitft.errors import RecipeError

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}


def ours(**options):
    torch.manual_seed(0)
    net = timm.create_model("vitflower_ti16", **({"img_size": 32} | TINY | options))
    with torch.no_grad():  # larger than a fresh model's, so that attention is not flat
        for block in net.blocks:
            block.attn.qkv.weight.mul_(30)
    return net.eval()


def timms(**options):
    net = timm.create_model("vit_tiny_patch16_224", **({"img_size": 32} | TINY | options)).eval()
    net.load_state_dict(ours(**options).state_dict())
    return net


def photos(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def block_weights(net, x):
    """Each block's [B, H, T, T], by walking through our blocks with `Attention.weights`."""
    tokens, found = net._embed(x), []
    with torch.no_grad():
        for block in net.blocks:
            found.append(block.attn.weights(block.norm1(tokens)))
            tokens = block(tokens)
    return found


def conv_net(name="test_resnet"):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).eval()


# -- rollout --------------------------------------------------------------------------------------


def test_two_tokens_and_two_blocks_roll_out_as_on_paper():
    first = torch.tensor([[[0.6, 0.4], [0.2, 0.8]]])
    second = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]])
    # A1 = [[.8 .2] [.1 .9]], A2 = [[.75 .25] [.45 .55]]; the class token's row of A2 A1
    row = maps.rolled([first, second], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(row, torch.tensor([[0.625, 0.375]]))
    alone = maps.rolled([first, second], torch.tensor([1.0, 0.0]), residual=1.0)
    torch.testing.assert_close(alone, torch.tensor([[1.0, 0.0]]))
    bare = maps.rolled([first, second], torch.tensor([0.0, 1.0]), residual=0.0)
    torch.testing.assert_close(bare, torch.tensor([[0.56, 0.44]]))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_rollout_is_the_product_of_whole_matrices(pool):
    net, x = ours(global_pool=pool, reg_tokens=2), photos(32, 32)
    whole = torch.eye(19, dtype=torch.float64).expand(2, 19, 19)
    for weights in block_weights(net, x):
        mean = weights.double().mean(dim=1)
        whole = (0.5 * torch.eye(19) + 0.5 * mean) @ whole  # later blocks on the left
    rows = whole[:, 0, 3:] if pool == "token" else whole[:, 3:, 3:].mean(dim=1)
    expected = rows / rows.sum(dim=1, keepdim=True)
    found = maps.rollout(net, x)
    assert found.shape == (2, 4, 4)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.reshape(2, 16), expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=(1, 2)), 1, atol=1e-6)
    assert found.max() > 1.2 / 16  # not flat, or the comparison would be empty


def test_timms_vit_and_ours_give_the_same_maps():
    a, b, x = ours(), timms(), photos(32, 32)
    for make in (maps.rollout, maps.heads, maps.gradient, maps.distance):
        np.testing.assert_allclose(make(a, x), make(b, x), atol=2e-5)


# -- heads ----------------------------------------------------------------------------------------


def test_rows_of_attention_sum_to_1():
    net, x = ours(), photos(32, 32)
    kept = maps._attention(net, x, lambda w: w)
    assert [tuple(w.shape) for w in kept] == [(2, 2, 17, 17)] * 3
    for weights, direct in zip(kept, block_weights(net, x), strict=True):
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, 17))
        torch.testing.assert_close(weights, direct)


def test_heads_are_the_class_tokens_rows_of_the_last_block():
    net, x = ours(), photos(32, 32)
    found, last = maps.heads(net, x), block_weights(net, x)[-1]
    np.testing.assert_allclose(found.reshape(2, 2, 16), last[:, :, 0, 1:], atol=1e-5)
    itself = last[:, :, 0, 0].numpy()
    np.testing.assert_allclose(found.sum(axis=(2, 3)) + itself, 1, atol=1e-5)


# -- gradient -------------------------------------------------------------------------------------


class OnePatch(nn.Module):
    """A network whose logits depend on one patch."""

    def __init__(self, row, column):
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.at = nn.Conv2d(3, 8, 8, 8), (row, column)
        self.head = nn.Linear(8, 5)

    def forward_features(self, x):
        return self.cut(x)

    def forward_head(self, x):
        return self.head(x[:, :, self.at[0], self.at[1]])


class Peek(nn.Module):
    """Attention of the class token to one patch alone."""

    def __init__(self, token):
        super().__init__()
        self.token = token

    def forward(self, x, **masks):
        return F.pad(x[:, self.token : self.token + 1], (0, 0, 0, x.shape[1] - 1))


@pytest.mark.parametrize("place", [(0, 0), (2, 5), (3, 1)])
def test_a_class_that_depends_on_one_patch_lights_that_patch_alone(place):
    (found,) = maps.gradient(OnePatch(*place), photos(32, 48, batch=1))
    expected = np.zeros((4, 6), np.float32)
    expected[place] = 1
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("make", [ours, timms])
def test_a_vit_that_reads_one_patch_lights_that_patch_alone(make):
    net, x = make(img_size=(32, 48)), photos(32, 48, batch=1)
    net.blocks[-1].attn = Peek(1 + 2 * 6 + 5)
    found = np.stack([maps.gradient(net, x, torch.tensor([k]))[0] for k in range(5)])
    peak = found[:, 2, 5].copy()
    found[:, 2, 5] = 0
    assert not found.any()
    assert 0 < peak.sum() < 5  # it speaks for some classes and against others


def test_where_features_are_averaged_it_is_the_heads_weights_laid_over_them():
    net, x = conv_net(), photos(96, 96)  # Grad-CAM and CAM (Zhou et al. 2016) agree here
    with torch.no_grad():
        weights = net.fc.weight[net(x).argmax(dim=1)]  # [B, D]
        cam = torch.einsum("bd,bdij->bij", weights, net.forward_features(x)).relu()
    found = maps.gradient(net, x)
    np.testing.assert_allclose(found, cam / cam.amax(dim=(1, 2), keepdim=True), atol=1e-5)
    assert found.max() == 1


def test_swins_channels_come_last():
    options = {"img_size": 56, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    net = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **options).eval()
    x = photos(56, 56)
    features = net.forward_features(x).detach().requires_grad_()  # [B, G, G, D]
    (slope,) = torch.autograd.grad(net.forward_head(features)[:, 3].sum(), features)
    spoke = (slope * features).sum(dim=3).relu().detach()
    found = maps.gradient(net, x, torch.tensor([3, 3]))
    np.testing.assert_allclose(found, spoke / spoke.amax(dim=(1, 2), keepdim=True), atol=1e-5)


def test_the_class_asked_about_changes_the_map_and_the_answer_is_the_default():
    net, x = conv_net(), photos(96, 96)
    answer = net(x).argmax(dim=1)
    np.testing.assert_array_equal(maps.gradient(net, x), maps.gradient(net, x, answer))
    other = maps.gradient(net, x, (answer + 1) % 5)
    assert np.abs(other - maps.gradient(net, x)).max() > 0.1


@pytest.mark.parametrize(
    ("name", "grid"),
    [("test_vit2", (10, 10)), ("test_vit3", (10, 10)), ("test_efficientnet", (5, 5)),
     ("test_convnext", (5, 5)), ("test_nfnet", (5, 5)), ("test_maxvit", (5, 5))],
)  # fmt: skip
def test_other_timm_networks_have_maps(name, grid):
    net = conv_net(name)
    (found,) = maps.gradient(net, photos(*net.pretrained_cfg["input_size"][1:], batch=1))
    assert found.shape == grid
    assert np.isfinite(found).all()
    assert 0 <= found.min() <= found.max() <= 1


# -- shapes and manners ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ours, timms])
def test_grids_need_not_be_square(make):
    net, x = make(img_size=(32, 48)), photos(32, 48)
    assert maps.rollout(net, x).shape == (2, 4, 6)
    assert maps.heads(net, x).shape == (2, 2, 4, 6)
    assert maps.gradient(net, x).shape == (2, 4, 6)
    assert maps.distance(net, x).shape == (2, 3, 2)
    assert maps.positions(net).shape == (4, 6, 4, 6)
    (planted,) = maps.heads(net, x[:1])
    direct = next(reversed([w.detach() for w in block_weights(ours(img_size=(32, 48)), x[:1])]))
    np.testing.assert_allclose(planted[0, 1, 2], direct[0, 0, 0, 1 + 6 + 2], atol=1e-6)


def test_sizes_that_the_model_learns_of_with_the_image_are_known():
    net = ours(dynamic_img_size=True)
    assert maps.rollout(net, photos(40, 24)).shape == (2, 5, 3)


def state_of(net):
    return (
        [(name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in
         net.named_modules()],
        [(name, p.requires_grad, p.grad is None) for name, p in net.named_parameters()],
        [(name, m.fused_attn) for name, m in net.named_modules() if hasattr(m, "fused_attn")],
        net.grad_checkpointing,
    )  # fmt: skip


@pytest.mark.parametrize("make", [maps.rollout, maps.heads, maps.gradient, maps.distance])
def test_the_network_is_given_back_as_it_was(make):
    net, x = ours(drop_rate=0.5, proj_drop_rate=0.5).train(), photos(32, 32)
    plain = make(net.eval(), x)
    net.train()
    net.blocks[1].eval()
    net.requires_grad_(False)
    net.head.requires_grad_(True)
    net.set_grad_checkpointing(True)
    before, seed = state_of(net), torch.get_rng_state()
    np.testing.assert_array_equal(make(net, x), plain)
    assert state_of(net) == before
    assert torch.equal(torch.get_rng_state(), seed)


@pytest.mark.parametrize("make", [maps.rollout, maps.gradient])
def test_the_network_is_given_back_after_a_failure_too(make):
    net = ours().train()
    before = state_of(net)
    with pytest.raises((ValueError, RecipeError), match=r"(?s)image is 24 x 32 px"):
        make(net, photos(24, 32))
    assert state_of(net) == before


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_callers_grad_mode_does_not_matter(around):
    net, x = ours().requires_grad_(False), photos(32, 32)
    plain = maps.gradient(net, x), maps.rollout(net, x)
    with around():
        np.testing.assert_array_equal(maps.gradient(net, x.clone()), plain[0])
        np.testing.assert_array_equal(maps.rollout(net, x.clone()), plain[1])
        assert torch.is_inference_mode_enabled() == (around is torch.inference_mode)


def test_a_photograph_has_its_map_whatever_stands_beside_it():
    net, x = ours(), photos(32, 32, batch=3)
    for make in (maps.rollout, maps.gradient):
        np.testing.assert_allclose(make(net, x)[1], make(net, x[1:2])[0], atol=1e-5)


# -- distance, positions, filters -----------------------------------------------------------------


def test_a_head_that_looks_everywhere_alike_has_the_mean_distance():
    net, x = ours(img_size=(8, 24)), photos(8, 24)
    with torch.no_grad():
        for block in net.blocks:
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
    # three patches in a row, 8 px wide: (0 + 8 + 16 + 8 + 0 + 8 + 16 + 8 + 0) / 9
    assert maps.evenly(net, x) == pytest.approx(64 / 9)
    np.testing.assert_allclose(maps.distance(net, x), np.full((2, 3, 2), 64 / 9), rtol=1e-5)


def test_distance_is_the_plain_sum_over_pairs_of_patches():
    net, x = ours(img_size=(16, 24), reg_tokens=1), photos(16, 24, batch=1)
    found, weights = maps.distance(net, x), block_weights(net, x)
    for layer, head in ((0, 0), (2, 1)):
        total = 0.0
        w = weights[layer][0, head, 2:, 2:].numpy()
        for i in range(6):
            for j in range(6):
                apart = np.hypot(8 * (i // 3 - j // 3), 8 * (i % 3 - j % 3))
                total += w[i, j] / w[i].sum() * apart / 6
        assert found[0, layer, head] == pytest.approx(total, rel=1e-5)


def test_positions_are_compared_by_cosine_and_prefix_tokens_left_out():
    net = ours(img_size=(16, 24), reg_tokens=1)
    with torch.no_grad():
        net.pos_embed.zero_()
        net.pos_embed[0, :2] = 9.0  # class token and register
        net.pos_embed[0, 2:, 0] = torch.tensor([1.0, 2, 0, -1, 0, 3])
        net.pos_embed[0, 2:, 1] = torch.tensor([0.0, 0, 1, 0, -5, 3])
    found = maps.positions(net)
    expected = [[1, 1, 0], [-1, 0, np.sqrt(0.5)]]  # of the first patch with each
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-6)
    np.testing.assert_allclose(found, found.transpose(2, 3, 0, 1), atol=1e-6)


def test_patch_filters_come_as_principal_components():
    net = ours()
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(192, 2, generator=generator)).Q.T  # two patterns
    with torch.no_grad():
        scale = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]]).repeat(8, 1)  # mean 0
        net.patch_embed.proj.weight.copy_((scale @ basis).reshape(32, 3, 8, 8))
    found = maps.filters(net, count=2)
    assert found.images.shape == (2, 8, 8, 3)
    assert found.total == 32
    np.testing.assert_allclose(found.shares, [0.9, 0.1], atol=1e-6)
    for image, pattern in zip(found.images, basis.reshape(2, 3, 8, 8), strict=True):
        wanted = pattern.permute(1, 2, 0).numpy()
        wanted = wanted * np.sign(wanted.flat[np.abs(wanted).argmax()])
        np.testing.assert_allclose(image, wanted, atol=1e-5)


def test_a_stem_comes_as_its_strongest_filters():
    net = conv_net()
    stem = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        stem.weight[5] *= 100
    found = maps.filters(net, count=3)
    assert found.shares is None
    assert found.total == len(stem.weight)
    np.testing.assert_allclose(found.images[0], stem.weight[5].detach().permute(1, 2, 0))


# -- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [maps.rollout, maps.heads, maps.distance])
@pytest.mark.parametrize("name", ["test_resnet", "test_maxvit"])
def test_networks_without_whole_attention_are_told_to_use_gradients(make, name):
    net = conv_net(name)
    text = r"explain.no_attention.*no attention of every patch.*\nfix: use the gradient method"
    with pytest.raises(RecipeError, match=text):
        make(net, photos(*net.pretrained_cfg["input_size"][1:], batch=1))


@pytest.mark.parametrize("make", [ours, timms])
def test_only_the_end_of_a_network_is_differentiated(make):
    net, seen = make(), []
    for block in net.blocks:
        block.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    maps.gradient(net, photos(32, 32))
    assert seen == [False, False, True]
    assert torch.is_grad_enabled()


class Blind(OnePatch):
    def forward_head(self, x):
        return self.head(x.detach().mean(dim=(2, 3)) * self.head.weight.new_ones(1)) + 0 * self.zero

    zero = torch.zeros(1, requires_grad=True)


class Flat(OnePatch):
    def forward_features(self, x):
        return self.cut(x).mean(dim=(2, 3))


class Odd(OnePatch):
    def forward_features(self, x):
        return self.cut(x).flatten(2).transpose(1, 2)[:, :7]

    def forward_head(self, x):
        return self.head(x.mean(dim=1))


@pytest.mark.parametrize(
    ("net", "text"),
    [
        (Blind(0, 0), "no class depends on its last features"),
        (Flat(0, 0), "its last features are not a map"),
        (Odd(0, 0), "its 7 tokens are not a grid of patches"),
    ],
)
def test_features_without_places_are_refused(net, text):
    with pytest.raises(RecipeError, match=rf"explain.no_map.*{text}\nfix: try --method rollout"):
        maps.gradient(net, photos(32, 32))


def test_models_without_a_table_of_positions_are_refused():
    for net in (ours(pos_embed="none"), conv_net()):
        with pytest.raises(RecipeError, match=r"explain.no_positions.*no table.*\nfix: choose"):
            maps.positions(net)


def test_filters_that_are_not_of_rgb_are_refused():
    text = r"explain.no_filters.*not a convolution over RGB\nfix: choose another model"
    for net in (ours(in_chans=1), nn.Linear(3, 3)):
        with pytest.raises(RecipeError, match=text):
            maps.filters(net)


def test_our_vit_is_what_is_looked_at():
    assert isinstance(ours(), vitft.VisionTransformer)
