"""Batches, normalisation and augmentation against loops over single images."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from salun_core.data import ImageSet
from salun_core.data.images import Normalisation, random_crop, random_flip
from salun_core.errors import DataError


def pixels(count=11, channels=3, height=7, width=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


def image_set(count=11, augment="none"):
    ids = [f"id{index}" for index in range(count)]
    return ImageSet(pixels(count), torch.arange(count), Normalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.1)), augment, ids)


def test_normalisation_is_measured_on_the_pixels():
    images = pixels(40)
    images[:, 2] = 77
    measured = Normalisation.of(images)
    values = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(measured.mean, values.mean(axis=(0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(measured.std[:2], values.std(axis=(0, 2, 3), ddof=1)[:2], atol=1e-6)
    assert measured.std[2] == 1.0
    expected = (values - np.array(measured.mean)[:, None, None]) / np.array(measured.std)[:, None, None]
    applied = measured.apply(images)
    np.testing.assert_allclose(applied.numpy(), expected, atol=1e-5)
    assert applied.is_contiguous(memory_format=torch.channels_last)
    assert applied.dtype == torch.float32


def test_each_image_is_cropped_to_its_own_window():
    images = pixels()
    cropped = random_crop(images, torch.Generator().manual_seed(3))
    offsets = torch.randint(0, 9, (2, len(images)), generator=torch.Generator().manual_seed(3))
    for index, image in enumerate(images.numpy()):
        padded = np.pad(image, ((0, 0), (4, 4), (4, 4)))
        top, left = offsets[0, index], offsets[1, index]
        assert np.array_equal(cropped[index].numpy(), padded[:, top : top + 7, left : left + 9])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 9), (4, 1, 3), (1, 1, 1)])
def test_batches_have_the_bits_of_images_cropped_flipped_and_scaled_one_by_one(layout, dtype, shape):
    """In any layout; the reference slices, and scales each channel by itself."""
    count, (channels, height, width) = 60, shape
    mean, std = (0.5, 0.4, 0.3, 0.2)[:channels], (0.2, 0.21, 0.22, 0.7)[:channels]
    stored = pixels(count, *shape).to(dtype).contiguous(memory_format=layout)
    images = ImageSet(stored, torch.arange(count), Normalisation(mean, std), "crop-flip")
    found = list(images.batches(32, torch.Generator().manual_seed(5), augment=True))
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(count, generator=generator)
    assert [len(labels) for _, labels in found] == [32, 28]
    for (batch, labels), index in zip(found, torch.split(order, 32), strict=True):
        offsets = torch.randint(0, 9, (2, len(index)), generator=generator)
        turned = torch.rand(len(index), generator=generator) < 0.5
        assert labels.tolist() == index.tolist()
        for place, source in enumerate(index.tolist()):
            top, left = offsets[:, place].tolist()
            padded = torch.nn.functional.pad(pixels(count, *shape)[source], (4, 4, 4, 4))
            image = padded[:, top : top + height, left : left + width].to(torch.float32)
            image = image.flip(2) if turned[place] else image
            if dtype == torch.uint8:
                scales = [1 / (255 * torch.tensor(value)) for value in std]
                shifts = [-torch.tensor(m) / torch.tensor(s) for m, s in zip(mean, std, strict=True)]
                image = torch.stack([image[c] * scales[c] + shifts[c] for c in range(channels)])
            assert torch.equal(batch[place], image)


def test_batches_do_not_change_the_images():
    images = image_set(40, "crop-flip")
    for layout in (torch.contiguous_format, torch.channels_last):
        stored = images.images.contiguous(memory_format=layout)
        kept = ImageSet(stored, images.labels, images.normalisation, "crop-flip")
        for batch, _ in kept.batches(7, torch.Generator().manual_seed(0), augment=True):
            batch.zero_()
        assert torch.equal(stored, images.images)


def test_every_offset_of_the_crop_occurs_equally_often():
    image = torch.zeros(8100, 1, 9, 9, dtype=torch.uint8)
    image[:, 0, 4, 4] = 1
    cropped = random_crop(image, torch.Generator().manual_seed(0))
    assert cropped.sum(dim=(1, 2, 3)).unique().tolist() == [1]
    counts = cropped.sum(dim=(0, 1)).double()
    assert float(((counts - 100) ** 2 / 100).sum()) < 150  # 80 degrees of freedom


def test_flip_mirrors_half_of_the_images():
    images = pixels(400)
    flipped = random_flip(images, torch.Generator().manual_seed(1))
    mirrored = 0
    for before, after in zip(images.numpy(), flipped.numpy(), strict=True):
        same, turned = np.array_equal(after, before), np.array_equal(after, before[:, :, ::-1])
        assert same or turned
        mirrored += turned
    assert 160 < mirrored < 240


def test_batches_in_order_cover_everything_once():
    images = image_set()
    batches = list(images.batches(4))
    assert [len(labels) for _, labels in batches] == [4, 4, 3]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(11))
    expected = images.normalisation.apply(images.images)
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), expected)


def test_shuffled_batches_cover_everything_once_and_repeat_with_their_seed():
    images = image_set()
    order = torch.cat([labels for _, labels in images.batches(4, torch.Generator().manual_seed(0))])
    assert order.tolist() != list(range(11))
    assert sorted(order.tolist()) == list(range(11))
    again = torch.cat([labels for _, labels in images.batches(4, torch.Generator().manual_seed(0))])
    assert torch.equal(order, again)
    for inputs, labels in images.batches(4, torch.Generator().manual_seed(0)):
        assert torch.equal(inputs, images.normalisation.apply(images.images[labels]))


@pytest.mark.parametrize("augment", ["none", "crop", "crop-flip"])
def test_augmentation_is_drawn_per_batch_after_the_order(augment):
    images = image_set(augment=augment)
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(11, generator=generator)
    for (inputs, labels), index in zip(
        images.batches(4, torch.Generator().manual_seed(5), augment=True), order.split(4), strict=True
    ):
        expected = images.images[index]
        if augment != "none":
            expected = random_crop(expected, generator)
        if augment == "crop-flip":
            expected = random_flip(expected, generator)
        assert torch.equal(labels, index)
        assert torch.equal(inputs, images.normalisation.apply(expected))


def test_no_augmentation_without_generator_or_by_default():
    images = image_set(augment="crop-flip")
    plain = torch.cat([inputs for inputs, _ in images.batches(4)])
    assert torch.equal(torch.cat([inputs for inputs, _ in images.batches(4, augment=True)]), plain)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    shuffled = torch.cat([inputs for inputs, _ in images.batches(4, torch.Generator().manual_seed(0))])
    assert torch.equal(shuffled, plain[order])


def test_selecting_relabelling_and_joining_keep_rows_aligned():
    images = image_set(augment="crop")
    some = images.select([7, 2])
    assert (list(some.ids), some.labels.tolist(), some.augment) == (["id7", "id2"], [7, 2], "crop")
    assert torch.equal(some.images, images.images[[7, 2]])
    wrong = some.relabelled(torch.tensor([0, 1]))
    assert (wrong.labels.tolist(), list(wrong.ids)) == ([0, 1], ["id7", "id2"])
    both = wrong.joined(images.select(torch.tensor([1])))
    assert (both.labels.tolist(), list(both.ids), len(both)) == ([0, 1, 1], ["id7", "id2", "id1"], 3)
    nameless = ImageSet(images.images, images.labels, images.normalisation)
    assert nameless.select([1]).ids == ()
    assert both.joined(nameless).ids == ()
    assert some.to("cpu").labels.tolist() == [7, 2]


def test_sets_of_different_kinds_cannot_be_joined():
    images = image_set()
    others = [
        ImageSet(images.images.float(), images.labels, images.normalisation),
        ImageSet(images.images[:, :, :5], images.labels, images.normalisation),
        ImageSet(images.images, images.labels, None),
    ]
    for other in others:
        with pytest.raises(DataError, match="cannot be joined"):
            images.joined(other)


def test_pairs_and_data_sets_count_as_normalised():
    floats, labels = torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 0, 1, 1], dtype=torch.int32)
    for given in ((floats, labels), TensorDataset(floats, labels)):
        taken = ImageSet.of(given)
        (inputs, targets), *_ = taken.batches(10)
        assert torch.equal(inputs, floats)
        assert targets.dtype == torch.int64
        assert targets.tolist() == labels.tolist()
    assert ImageSet.of(taken) is taken
    with pytest.raises(DataError, match="5 against 4"):
        ImageSet.of((floats, labels[:4]))
