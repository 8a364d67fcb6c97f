"""`UNet`: the published network, whatever the memory layout, the precision or the compiler."""

import copy
import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genfast import UNet
from genfast.models.unet import time_embedding

T = torch.tensor([0, 3, 500, 999])
PARAMETERS = {"tiny": (686_769, 687_347), "small": (4_435_393, 4_437_699), "base": (35_741_697, 35_746_307)}


def small(image_shape=(1, 8, 8), **options):
    return UNet(image_shape, **{"channels": 8, "channel_mults": (1, 2, 2), "num_res_blocks": 1, "heads": 2, **options})


def woken(net):
    """What starts at zero is drawn, so that every path shows in the output."""
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def images(*shape):
    return torch.randn(len(T), *shape)


def parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


def attentions(net):
    return sorted(name.removesuffix(".attention.qkv") for name, _ in net.named_modules() if name.endswith("qkv"))


def to_diffusers(net, image_shape, widths, attention, head_dim, scale_shift):
    """Diffusers' network with the same weights."""
    levels = range(len(widths))
    theirs = pytest.importorskip("diffusers", reason="diffusers is not installed").UNet2DModel(
        sample_size=image_shape[1:],
        in_channels=image_shape[0],
        out_channels=net.out_channels,
        block_out_channels=widths,
        layers_per_block=len(net.down[0]),
        down_block_types=["AttnDownBlock2D" if level in attention else "DownBlock2D" for level in levels],
        up_block_types=["AttnUpBlock2D" if level in attention else "UpBlock2D" for level in reversed(levels)],
        attention_head_dim=head_dim,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_num_groups=net.norm.num_groups,
        attn_norm_num_groups=net.norm.num_groups,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
    )
    pairs = [
        (net.time[0], theirs.time_embedding.linear_1),
        (net.time[2], theirs.time_embedding.linear_2),
        (net.stem, theirs.conv_in),
        (net.norm, theirs.conv_norm_out),
        (net.head, theirs.conv_out),
    ]
    pairs += zip(net.shrink, (stage.downsamplers[0].conv for stage in theirs.down_blocks[:-1]), strict=True)
    pairs += zip(net.grow, (stage.upsamplers[0].conv for stage in theirs.up_blocks[:-1]), strict=True)
    blocks = list(zip(net.middle, theirs.mid_block.resnets, [*theirs.mid_block.attentions, None], strict=True))
    for ours, stage in zip([*net.down, *net.up], [*theirs.down_blocks, *theirs.up_blocks], strict=True):
        blocks += zip(ours, stage.resnets, getattr(stage, "attentions", [None] * len(ours)), strict=True)
    for block, resnet, attend in blocks:
        pairs += [(getattr(block, name), getattr(resnet, name)) for name in ("norm1", "conv1", "norm2", "conv2")]
        pairs += [(block.time, resnet.time_emb_proj), (block.skip, resnet.conv_shortcut)]
        if attend is not None:
            pairs += [(block.attention.norm, attend.group_norm), (block.attention.out, attend.to_out[0])]
            qkv = block.attention.qkv
            for layer, weight, bias in zip(
                (attend.to_q, attend.to_k, attend.to_v), qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True
            ):
                layer.load_state_dict({"weight": weight, "bias": bias})
    for ours, layer in pairs:
        if layer is not None:
            layer.load_state_dict(ours.state_dict())
    assert parameters(theirs) == parameters(net)
    return theirs.eval()


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize(("image_shape", "heads"), [((3, 16, 16), 1), ((1, 8, 16), 2)])
def test_equals_diffusers_network_with_the_same_weights(image_shape, heads, scale_shift):
    options = {"attention_resolutions": [8], "num_res_blocks": 2, "heads": heads, "scale_shift": scale_shift}
    net = woken(small(image_shape, **options))
    theirs = to_diffusers(net, image_shape, [8, 16, 16], {1}, 16 // heads, scale_shift)
    x = images(*image_shape)
    with torch.no_grad():
        torch.testing.assert_close(net(x, T), theirs(x, T).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", list(PARAMETERS))
def test_presets_have_the_documented_sizes(preset):
    for image_shape, expected in zip(((1, 28, 28), (3, 32, 32)), PARAMETERS[preset], strict=True):
        with torch.device("meta"):
            net = UNet(image_shape, preset)
            assert net(torch.empty(2, *image_shape), torch.empty(2)).shape == (2, *image_shape)
        assert parameters(net) == expected
        assert f"{expected:,}" in UNet.__doc__


def test_base_is_the_published_cifar10_network():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    with torch.device("meta"):
        net = UNet((3, 32, 32), "base")
        explicit = UNet((3, 32, 32), "base", 128, (1, 2, 2, 2), 2, [16], 0.1, 3, 32, 1)
        theirs = diffusers.UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
            layers_per_block=2,
        )
    assert str(net) == str(explicit)
    assert {module.heads for module in net.modules() if hasattr(module, "heads")} == {1}
    assert parameters(net) == parameters(theirs)
    assert round(parameters(net) / 1e6, 1) == 35.7


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 32), (1, 7, 7), (2, 5, 9), (1, 1, 1)])
def test_any_size_passes(image_shape):
    net, x = woken(small(image_shape, channels=4, out_channels=6)), images(*image_shape).requires_grad_()
    y = net(x, T)
    assert y.shape == (len(T), 6, *image_shape[1:])
    y[..., -1, -1].sum().backward()
    assert x.grad[..., -1, -1].all()
    assert y.isfinite().all()


def test_attention_is_where_it_was_asked_for():
    for image_shape in ((1, 8, 8), (1, 5, 8), (1, 7, 7)):
        assert attentions(small(image_shape, attention_resolutions=[])) == ["middle.0"]
        assert attentions(small(image_shape, attention_resolutions=[4])) == ["down.1.0", "middle.0", "up.1.0", "up.1.1"]
    both = ["down.0.0", "down.2.0", "middle.0", "up.0.0", "up.0.1", "up.2.0", "up.2.1"]
    assert attentions(small(attention_resolutions=[2, 8])) == both


def test_a_new_net_predicts_zero_and_its_blocks_change_nothing():
    net, x = small(), images(1, 8, 8)
    assert not net(x, T).any()
    h, embedding = torch.randn(2, 16, 2, 2), torch.randn(2, 32)
    assert torch.equal(net.middle[0](h, embedding), h)
    assert not torch.equal(woken(net).middle[0](h, embedding), h)


def test_every_image_has_its_own_time_and_no_other_image_matters():
    net, x = woken(small(scale_shift=True)), images(1, 8, 8)
    y = net(x, T)
    for i in range(len(T)):
        torch.testing.assert_close(net(x[i : i + 1], T[i : i + 1]), y[i : i + 1], rtol=1e-4, atol=1e-5)
    moved = net(x, T + torch.tensor([0, 1, 0, 0]))
    assert (moved - y).abs().amax((1, 2, 3)).gt(1e-4).tolist() == [False, True, False, False]
    torch.testing.assert_close(net(x, T.double()), y, rtol=0, atol=0)


def test_every_block_hears_the_time():
    net, x = woken(small()), images(1, 8, 8)
    blocks = [module for module in net.modules() if hasattr(module, "conv2")]
    assert len(blocks) == 3 + 2 + 6
    net(x, T).square().sum().backward()
    assert all(block.time.weight.grad.any() for block in blocks)


def test_dropout_is_of_training_only():
    net, x = woken(small(dropout=0.5)), images(1, 8, 8)
    assert not torch.equal(net(x, T), net(x, T))
    without = small()
    without.load_state_dict(net.state_dict())
    assert torch.equal(net.eval()(x, T), without(x, T))
    assert all(module.p == 0.1 for module in UNet(preset="base").modules() if isinstance(module, nn.Dropout))


@pytest.mark.parametrize("options", [{}, {"scale_shift": True, "num_res_blocks": 2}], ids=["add", "scale_shift"])
def test_training_reaches_every_parameter(options):
    net, x, target = small(attention_resolutions=[4], **options), images(1, 8, 8), images(1, 8, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for step in range(3):
        optimizer.zero_grad()
        F.mse_loss(net(x, T), target).backward()
        reached = {name for name, parameter in net.named_parameters() if parameter.grad.any()}
        if step == 0:
            assert reached == {"head.weight", "head.bias"}
        optimizer.step()
    assert reached == set(net.state_dict())


def test_training_learns_a_batch():
    net, x, target = small(), images(1, 8, 8), images(1, 8, 8)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.mse_loss(net(x, T), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


class Recorder(TorchDispatchMode):
    """Counts the operations, and lists the images that are not channels_last."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes, self.counts, self.contiguous = sizes, Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.counts[name] += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 4 and tensor.shape[2:] in self.sizes:
                strides = tensor.stride()
                if strides[1] != 1 or not strides[0] >= strides[2] >= strides[3]:
                    self.contiguous.append((name, tuple(tensor.shape), strides))
        return result


# On CUDA torch's own GroupNorm is contiguous when it is not compiled.
@pytest.mark.parametrize("scale_shift", [False, True])
def test_channels_last_stays_and_nothing_is_copied(scale_shift):
    net, x = woken(small((2, 12, 12), attention_resolutions=[6], scale_shift=scale_shift)), images(2, 12, 12)
    expected, gradient = net(x, T), images(2, 12, 12)
    gradients = torch.autograd.grad(expected, list(net.parameters()), gradient)
    net.to(memory_format=torch.channels_last)
    x, gradient = (each.to(memory_format=torch.channels_last) for each in (x, gradient))
    t = T.float()
    with Recorder([(12, 12), (6, 6), (3, 3)]) as recorder:
        y = net(x, t)
        y.backward(gradient)
    assert recorder.contiguous == []
    assert not {"clone", "copy_", "_to_copy", "contiguous"} & set(recorder.counts)
    assert recorder.counts["_scaled_dot_product_flash_attention_for_cpu"] == len(attentions(net)) == 4
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_autocast_and_other_precisions():
    net, x = woken(small(attention_resolutions=[4])), images(1, 8, 8)
    exact = copy.deepcopy(net).double()(x.double(), T)
    torch.testing.assert_close(net(x, T).double(), exact, rtol=1e-4, atol=1e-5)
    bound = 0.03 * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x, T)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() < bound
    y.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in net.parameters())
    y = net.to(torch.bfloat16)(x.to(torch.bfloat16), T)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() < bound


def test_aot_eager_gives_the_eager_output_and_gradients():
    net, x = woken(small(attention_resolutions=[4])), images(1, 8, 8)
    expected = net(x, T)
    gradients = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
    keys = list(net.state_dict())
    net.compile(fullgraph=True, backend="aot_eager")
    y = net(x, T)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert list(net.state_dict()) == keys


@torch.no_grad()
def test_inductor_gives_the_eager_output():
    net, x = woken(small((1, 5, 5), channel_mults=(1, 1))), images(1, 5, 5)
    expected = net(x, T)
    torch.testing.assert_close(torch.compile(net, fullgraph=True)(x, T), expected, rtol=1e-4, atol=1e-5)


def test_export_keeps_the_batch_free():
    net, x = woken(small(attention_resolutions=[4])), images(1, 8, 8)
    rows = torch.export.Dim("rows")
    program = torch.export.export(net, (x, T), dynamic_shapes={"x": {0: rows}, "t": {0: rows}})
    for n in (4, 9):
        x, t = torch.randn(n, 1, 8, 8), torch.arange(n)
        torch.testing.assert_close(program.module()(x, t), net(x, t))


def test_copies_and_averages_stand_alone():
    net, x = woken(small()), images(1, 8, 8)
    y = net(x, T)
    twin, average = copy.deepcopy(net), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
    average.update_parameters(net)
    torch.testing.assert_close(twin(x, T), y)
    for averaged, first in zip(average.module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(averaged, 2 * first)
    another = small()
    another.load_state_dict(twin.state_dict())
    torch.testing.assert_close(another(x, T), y)
    assert not list(net.buffers())


def test_the_arguments_survive_json():
    options = {
        "image_shape": (3, 12, 12),
        "preset": "tiny",
        "channels": 12,
        "channel_mults": (1, 3),
        "num_res_blocks": 2,
        "attention_resolutions": (12,),
        "dropout": 0.2,
        "out_channels": 6,
        "groups": 4,
        "heads": 3,
        "scale_shift": True,
    }
    net, again = UNet(**options), UNet(**json.loads(json.dumps(options)))
    assert str(again) == str(net)
    assert again(images(3, 12, 12), T).shape == (len(T), 6, 12, 12)
    assert {module.num_groups for module in net.modules() if isinstance(module, nn.GroupNorm)} == {4}
    assert {module.heads for module in net.modules() if hasattr(module, "heads")} == {3}
    assert [len(level) for level in (net.down, net.down[0], net.up[0])] == [2, 2, 3]


@pytest.mark.parametrize(
    "options",
    [
        {"image_shape": (28, 28)},
        {"image_shape": (1, 28.0, 28)},
        {"preset": "huge"},
        {"channels": 0},
        {"channels": 8.0},
        {"channel_mults": ()},
        {"channel_mults": (1, 0.5)},
        {"channel_mults": 2},
        {"num_res_blocks": 0},
        {"attention_resolutions": [16]},
        {"attention_resolutions": 14},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": "no"},
        {"out_channels": 0},
        {"groups": 3},
        {"groups": 0},
        {"groups": 2.0},
        {"heads": 0},
        {"heads": 3},
        {"scale_shift": "yes"},
    ],
    ids=str,
)
def test_bad_arguments_are_named(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected .*, got "):
        UNet(**options)


@pytest.mark.parametrize(
    ("name", "x", "t"),
    [
        ("x", torch.zeros(2, 3, 8, 8), torch.zeros(2)),
        ("x", torch.zeros(2, 1, 8, 9), torch.zeros(2)),
        ("x", torch.zeros(2, 64), torch.zeros(2)),
        ("t", torch.zeros(2, 1, 8, 8), torch.zeros(3)),
        ("t", torch.zeros(2, 1, 8, 8), torch.zeros(())),
        ("t", torch.zeros(2, 1, 8, 8), torch.zeros(2, 1)),
        ("t", torch.zeros(2, 1, 8, 8), torch.zeros(2, device="meta")),
        ("t", torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.bool)),
        ("t", torch.zeros(2, 1, 8, 8), 3),
    ],
)
def test_bad_input_is_named(name, x, t):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        small()(x, t)


@pytest.mark.parametrize("dim", [4, 5, 16, 33, 128])
@pytest.mark.parametrize("max_period", [10000, 100])
def test_time_embedding_is_diffusers(dim, max_period):
    embeddings = pytest.importorskip("diffusers.models.embeddings", reason="diffusers is not installed")
    for t in (T, T.int(), T.double() / 7, torch.tensor([-1.6, 1.1])):
        ours = time_embedding(t, dim, max_period)
        assert ours.dtype == torch.float32
        theirs = embeddings.get_timestep_embedding(t, dim, max_period=max_period)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_time_embedding_is_fp32_under_autocast():
    t = torch.arange(1000)
    steps = torch.arange(8, dtype=torch.float64)
    angles = t.double().unsqueeze(1) * 10000 ** (-steps / 7)
    with torch.autocast("cpu", torch.bfloat16):
        ours = time_embedding(t, 16)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), torch.cat((angles.sin(), angles.cos()), 1), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "t", "dim"),
    [("t", T.bool(), 8), ("t", T.view(2, 2), 8), ("t", T + 1j, 8), ("dim", T, 3)],
)
def test_time_embedding_names_bad_arguments(name, t, dim):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        time_embedding(t, dim)
