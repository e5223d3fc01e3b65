"""The reference CNNs: published parameter names, shapes and counts; sizes; errors."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyops import models


def build_without_memory(factory, **options):
    with torch.device("meta"):
        return factory(**options)


@pytest.mark.parametrize(
    ("factory", "parameters"),
    [
        (models.AlexNet, 61_100_840),
        (models.vgg11, 132_863_336),
        (models.vgg16, 138_357_544),
        (models.resnet18, 11_689_512),
        (models.resnet50, 25_557_032),
    ],
)
def test_published_parameter_counts(factory, parameters):
    model = build_without_memory(factory)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def linear_names(prefix):
    return {f"{prefix}.weight", f"{prefix}.bias"}


def norm_names(prefix):
    statistics = {f"{prefix}.running_mean", f"{prefix}.running_var"}
    return linear_names(prefix) | statistics | {f"{prefix}.num_batches_tracked"}


def resnet_names(depths, convolutions, stages_with_projection):
    names = {"conv1.weight"} | norm_names("bn1") | linear_names("fc")
    for stage, depth in enumerate(depths, start=1):
        for index in range(depth):
            block = f"layer{stage}.{index}"
            for number in range(1, convolutions + 1):
                names |= {f"{block}.conv{number}.weight"} | norm_names(f"{block}.bn{number}")
            if index == 0 and stage in stages_with_projection:
                names |= {f"{block}.downsample.0.weight"} | norm_names(f"{block}.downsample.1")
    return names


def plain_names(features, classifier):
    names = set()
    for index in features:
        names |= linear_names(f"features.{index}")
    for index in classifier:
        names |= linear_names(f"classifier.{index}")
    return names


@pytest.mark.parametrize(
    ("factory", "names"),
    [
        (models.AlexNet, plain_names([0, 3, 6, 8, 10], [1, 4, 6])),
        (models.vgg11, plain_names([0, 3, 6, 8, 11, 13, 16, 18], [0, 3, 6])),
        (
            models.vgg16,
            plain_names([0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28], [0, 3, 6]),
        ),
        (models.resnet18, resnet_names((2, 2, 2, 2), 2, {2, 3, 4})),
        (models.resnet50, resnet_names((3, 4, 6, 3), 3, {1, 2, 3, 4})),
    ],
)
def test_published_parameter_names(factory, names):
    assert set(build_without_memory(factory).state_dict()) == names


@pytest.mark.parametrize(
    ("factory", "shapes"),
    [
        (
            models.AlexNet,
            {
                "features.0.weight": (64, 3, 11, 11),
                "features.3.weight": (192, 64, 5, 5),
                "features.10.bias": (256,),
                "classifier.1.weight": (4096, 9216),
                "classifier.6.weight": (1000, 4096),
            },
        ),
        (
            models.vgg16,
            {
                "features.0.weight": (64, 3, 3, 3),
                "features.17.weight": (512, 256, 3, 3),
                "features.28.weight": (512, 512, 3, 3),
                "classifier.0.weight": (4096, 25088),
                "classifier.6.bias": (1000,),
            },
        ),
        (
            models.resnet18,
            {
                "conv1.weight": (64, 3, 7, 7),
                "layer2.0.conv1.weight": (128, 64, 3, 3),
                "layer2.0.downsample.0.weight": (128, 64, 1, 1),
                "fc.weight": (1000, 512),
            },
        ),
        (
            models.resnet50,
            {
                "layer1.0.conv1.weight": (64, 64, 1, 1),
                "layer1.0.downsample.0.weight": (256, 64, 1, 1),
                "layer1.1.conv1.weight": (64, 256, 1, 1),
                "layer4.0.conv2.weight": (512, 512, 3, 3),
                "layer4.2.conv3.weight": (2048, 512, 1, 1),
                "fc.weight": (1000, 2048),
            },
        ),
    ],
)
def test_published_shapes(factory, shapes):
    state = build_without_memory(factory).state_dict()
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_stride_of_a_bottleneck_sits_on_its_3x3():
    block = build_without_memory(models.resnet50).layer2[0]
    strides = [conv.stride for conv in (block.conv1, block.conv2, block.conv3)]
    assert strides == [(1, 1), (2, 2), (1, 1)]


def test_resnet_block_adds_the_shortcut_before_the_last_relu():
    block = models.resnet18(num_classes=2).layer1[0].eval()
    x = torch.randn(2, 64, 5, 6)
    inner = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), F.relu(inner + x))


@pytest.mark.parametrize(
    ("preset", "image", "features", "convolutions"),
    [
        ("cifar", (3, 32, 32), 64 * 8 * 8, [(32, 3), (64, 32)]),
        ("mnist", (1, 28, 28), 64 * 3 * 3, [(32, 1), (64, 32), (64, 64)]),
        ("deep", (3, 32, 32), 128 * 4 * 4, [(32, 3), (64, 32), (128, 64)]),
    ],
)
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_small_presets(preset, image, features, convolutions, pool):
    model = models.small_cnn(preset, pool=pool)
    found = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert found == [(out, into, 3, 3) for out, into in convolutions]
    assert model.fc1.in_features == features
    assert model.fc1.out_features == (64 if preset == "mnist" else 128)
    assert isinstance(model.pool, nn.MaxPool2d if pool == "max" else nn.AvgPool2d)
    assert model(torch.randn(2, *image)).shape == (2, 10)


def test_small_cnn_computes_what_its_layers_say():
    model = models.SmallCNN.mnist()
    x = torch.randn(3, 1, 28, 28)
    features = F.max_pool2d(F.relu(model.conv1(x)), 2)
    features = F.max_pool2d(F.relu(model.conv2(features)), 2)
    features = F.relu(model.conv3(features)).reshape(3, -1)
    torch.testing.assert_close(model(x), model.fc2(F.relu(model.fc1(features))))


@pytest.mark.parametrize("preset", ["cifar", "mnist", "deep"])
@pytest.mark.parametrize("size", [(21, 46), 19])
def test_small_cnn_takes_any_size_that_leaves_something(preset, size):
    model = models.small_cnn(preset, image_size=size, in_channels=2, num_classes=5)
    height, width = (size, size) if isinstance(size, int) else size
    assert model(torch.randn(1, 2, height, width)).shape == (1, 5)


@pytest.mark.parametrize(("preset", "smallest"), [("cifar", 4), ("mnist", 18), ("deep", 8)])
def test_small_cnn_smallest_size(preset, smallest):
    model = models.small_cnn(preset, image_size=smallest)
    assert model(torch.randn(1, model.in_channels, smallest, smallest)).shape == (1, 10)
    with pytest.raises(ValueError, match=rf"image_size: .*at least {smallest}, got {smallest - 1}"):
        models.small_cnn(preset, image_size=smallest - 1)
    with pytest.raises(ValueError, match=rf"image_size: .*got {smallest}x{smallest - 1}"):
        models.small_cnn(preset, image_size=(smallest, smallest - 1))


@pytest.mark.parametrize(
    ("factory", "smallest"), [(models.AlexNet, 63), (models.vgg11, 32), (models.vgg16, 32)]
)
def test_large_models_smallest_size(factory, smallest):
    model = build_without_memory(factory)
    x = torch.empty(2, 3, smallest, smallest + 1, device="meta")
    assert model(x).shape == (2, 1000)
    # The bound is the architecture's own: its layers refuse one pixel less.
    with pytest.raises(RuntimeError):
        model.features(torch.empty(2, 3, smallest - 1, smallest, device="meta"))
    with pytest.raises(ValueError, match=rf"input: .*at least {smallest}, got {smallest - 1}x"):
        model(torch.empty(2, 3, smallest - 1, smallest, device="meta"))


@pytest.mark.parametrize("factory", [models.resnet18, models.resnet50])
@pytest.mark.parametrize("size", [(1, 1), (33, 40), (224, 224)])
def test_resnets_take_any_size(factory, size):
    model = build_without_memory(factory, num_classes=7).eval()
    assert model(torch.empty(2, 3, *size, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("factory", [models.AlexNet, models.vgg11, models.resnet18])
def test_num_classes_and_in_channels(factory):
    model = build_without_memory(factory, num_classes=12, in_channels=1).eval()
    assert model(torch.empty(1, 1, 64, 64, device="meta")).shape == (1, 12)
    with pytest.raises(ValueError, match=r"input: expected shape \(batch, 1, .*got \(1, 3,"):
        model(torch.empty(1, 3, 64, 64, device="meta"))
    with pytest.raises(ValueError, match=r"input: expected shape .*got \(1, 64, 64\)"):
        model(torch.empty(1, 64, 64, device="meta"))


def test_gradients_reach_every_parameter():
    model = models.resnet18(num_classes=3)
    model(torch.randn(2, 3, 33, 33)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("factory", [models.AlexNet, models.vgg11, models.resnet50])
@pytest.mark.parametrize("argument", ["num_classes", "in_channels"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_bad_counts(factory, argument, value):
    with pytest.raises(ValueError, match=f"{argument}: expected a positive integer, got {value}"):
        build_without_memory(factory, **{argument: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "mean"}, 'pool: expected "max" or "avg", got \'mean\''),
        ({"hidden": 0}, "hidden: expected a positive integer, got 0"),
        ({"num_classes": 0}, "num_classes: expected a positive integer, got 0"),
        ({"in_channels": 0}, "in_channels: expected a positive integer, got 0"),
        ({"padding": -1}, "padding: expected a non-negative integer, got -1"),
        ({"channels": (8,)}, r"channels: expected two or three numbers, got \(8,\)"),
        ({"channels": (8, 0)}, "channels: expected a positive integer, got 0"),
        ({"channels": 5}, "channels: expected two or three numbers, got 5"),
        ({"padding": True}, "padding: expected a non-negative integer, got True"),
        *(
            ({"image_size": size}, f"image_size: expected a positive integer or a pair.*{size}")
            for size in (0, "a", 28.0, None, True)
        ),
        ({"image_size": (1, 2, 3)}, r"image_size: expected .* or a pair of them, got \(1, 2, 3\)"),
    ],
)
def test_small_cnn_bad_arguments(options, message):
    arguments = {"channels": (8, 8), "hidden": 4, "image_size": 16, **options}
    with pytest.raises(ValueError, match=message):
        models.SmallCNN(**arguments)


def test_small_cnn_bad_calls():
    with pytest.raises(ValueError, match=r"preset: expected one of .*got 'imagenet'"):
        models.small_cnn("imagenet")
    with pytest.raises(ValueError, match=r"preset: expected one of .*got \['a'\]"):
        models.small_cnn(["a"])
    model = models.SmallCNN.cifar()
    with pytest.raises(ValueError, match=r"input: .*\(32, 32\), got \(32, 31\)"):
        model(torch.randn(1, 3, 32, 31))
    with pytest.raises(ValueError, match=r"input: expected shape \(batch, 3,"):
        model(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match="input: expected shape"):
        model(torch.randn(3, 32, 32))


def test_state_dicts_are_interchangeable_between_equal_models():
    source, target = models.SmallCNN.deep(), models.SmallCNN.deep()
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(source(x), target(x))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(x), target(x))
