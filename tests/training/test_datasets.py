"""Images from every source."""

import numpy as np
import pytest
import torch
from PIL import Image

from genfast.training import load_dataset


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def write_images(folder, count, size=(8, 6), mode="L", start=0):
    """`count` PNGs of one grey value each: start, start + 1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(start, start + count):
        Image.new("L", size, index).convert(mode).save(folder / f"{index:03}.png")


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist_like(root, name, digits, count=20):
    """The four files that torchvision reads for MNIST and its kin."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part, images, labels in (
        ("train", digits.train, digits.train_labels),
        ("t10k", digits.test, digits.test_labels),
    ):
        write_idx(raw / f"{part}-images-idx3-ubyte", images[:count, 0].numpy())
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels[:count].numpy().astype(np.uint8))


def test_digits_are_real_and_complete(digits):
    assert digits.train.shape == (5000, 1, 28, 28)
    assert digits.test.shape == (1000, 1, 28, 28)
    assert digits.train.dtype == digits.test.dtype == torch.uint8
    assert digits.train.amin() == 0
    assert digits.train.amax() == 255
    # MNIST's own mean is 0.1307.
    assert abs(digits.train.double().mean() / 255 - 0.1307) < 0.002
    assert len(digits.train.flatten(1).unique(dim=0)) == 5000


def test_labels_are_those_of_the_images(digits):
    for images, labels in ((digits.train, digits.train_labels), (digits.test, digits.test_labels)):
        assert (labels.dtype, labels.shape) == (torch.int64, images.shape[:1])
    # A one has the least ink and a zero the most, by far.
    ink = torch.stack([digits.test[digits.test_labels == digit].double().mean() for digit in range(10)])
    assert (ink.argmin(), ink.argmax()) == (1, 0)
    assert torch.equal(load_dataset("digits", image_size=14).test_labels, digits.test_labels)


def test_bundle_has_labels_and_licence():
    from importlib.resources import files

    folder = files("genfast") / "data"
    with (folder / "digits.npz").open("rb") as file, np.load(file) as arrays:
        assert np.bincount(arrays["y_train"]).tolist() == [500] * 10
        assert np.bincount(arrays["y_test"]).tolist() == [100] * 10
    assert "Creative Commons" in (folder / "LICENSE-MNIST.txt").read_text()


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_named_sets_are_read_from_the_root(name, folder, digits, tmp_path, monkeypatch):
    write_mnist_like(tmp_path, folder, digits)
    splits = load_dataset(name, root=tmp_path)
    assert splits.name == name
    assert torch.equal(splits.train, digits.train[:20])
    assert torch.equal(splits.test, digits.test[:20])
    assert torch.equal(splits.train_labels, digits.train_labels[:20])
    assert torch.equal(splits.test_labels, digits.test_labels[:20])
    monkeypatch.setenv("GENFAST_DATA", str(tmp_path))
    assert torch.equal(load_dataset(name).test, splits.test)


def test_absent_set_that_cannot_be_downloaded(tmp_path, monkeypatch):
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        # Nothing listens there, so every download fails at once, with or without a network.
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(OSError, match=r"data: mnist can be neither read from .* nor downloaded"):
        load_dataset("mnist", root=tmp_path)


def test_damaged_set_is_named(digits, tmp_path):
    write_mnist_like(tmp_path, "MNIST", digits)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OSError, match="data: mnist can be neither read"):
        load_dataset("mnist", root=tmp_path)


def test_resizing_a_named_set(digits):
    resized = load_dataset("digits", image_size=14)
    assert resized.train.shape == (5000, 1, 14, 14)
    assert resized.train.dtype == torch.uint8
    # Halving by area keeps the mean; the border of black pixels keeps bilinear close to it.
    assert abs(resized.test.double().mean() - digits.test.double().mean()) < 0.5


def test_folder_holds_out_every_tenth(tmp_path):
    write_images(tmp_path / "a", 15)
    write_images(tmp_path / "b" / "deep", 10, start=15)
    (tmp_path / "labels.csv").write_text("not an image")
    (tmp_path / "a" / "._000.png").write_text("a Mac's shadow file")
    splits = load_dataset(tmp_path)
    assert splits.test[:, 0, 0, 0].tolist() == [9, 19]
    assert splits.train[:, 0, 0, 0].tolist() == [i for i in range(25) if i not in (9, 19)]
    assert splits.train.shape == (23, 1, 6, 8)
    assert splits.train_labels is splits.test_labels is None
    assert splits.name == tmp_path.name


def test_folder_with_its_own_splits(tmp_path):
    write_images(tmp_path / "train", 3)
    write_images(tmp_path / "test", 2, start=100)
    splits = load_dataset(str(tmp_path))
    assert splits.train[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert splits.test[:, 0, 0, 0].tolist() == [100, 101]


def test_one_colour_image_makes_all_colour(tmp_path):
    write_images(tmp_path, 3)
    Image.new("RGB", (8, 6), (10, 20, 30)).save(tmp_path / "003.png")
    Image.new("P", (8, 6), 0).save(tmp_path / "004.png")
    splits = load_dataset(tmp_path)
    assert splits.train.shape == (4, 3, 6, 8)
    assert splits.train[1, :, 0, 0].tolist() == [1, 1, 1]
    assert splits.train[3, :, 0, 0].tolist() == [10, 20, 30]


def test_image_size_scales_the_shorter_side_and_cuts_the_middle(tmp_path):
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 200
    for name in ("a.png", "b.png"):
        Image.fromarray(wide).save(tmp_path / name)
    splits = load_dataset(tmp_path, image_size=5)
    assert splits.train.shape == (1, 1, 5, 5)
    assert (splits.train[0, 0, :, 1:4] == 200).all()


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "b.jpg"):
        Image.new("L", (8, 6)).save(tmp_path / name, exif=exif)
    assert load_dataset(tmp_path).train.shape == (1, 1, 8, 6)


@pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "text", "truncated"])
def test_unreadable_image_is_named(tmp_path, content):
    write_images(tmp_path, 3)
    path = tmp_path / "001.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    if content is None:
        Image.fromarray(noise).save(path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data: cannot read the image .*001\.png"):
        load_dataset(tmp_path)


def test_sixteen_bit_image_is_refused(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / name)
    with pytest.raises(ValueError, match="more than 8 bits"):
        load_dataset(tmp_path)


def test_other_errors_of_load_dataset(tmp_path):
    with pytest.raises(ValueError, match=r"data: expected one of digits, mnist, .* got 'nonesuch'"):
        load_dataset("nonesuch")
    with pytest.raises(ValueError, match="holds no images"):
        load_dataset(tmp_path)
    write_images(tmp_path, 1)
    with pytest.raises(ValueError, match="a single image"):
        load_dataset(tmp_path)
    write_images(tmp_path, 1, size=(9, 6), start=1)
    with pytest.raises(ValueError, match=r"001\.png is 6 x 9 and .*000\.png is 6 x 8 .*--image-size"):
        load_dataset(tmp_path)
    with pytest.raises(ValueError, match="image_size: expected a positive int, got 0"):
        load_dataset("digits", image_size=0)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_other_names_of_the_held_out_split(name, tmp_path):
    write_images(tmp_path / "train", 12)
    write_images(tmp_path / name, 2, start=100)
    splits = load_dataset(tmp_path)
    assert splits.train[:, 0, 0, 0].tolist() == list(range(12))
    assert splits.test[:, 0, 0, 0].tolist() == [100, 101]
    write_images(tmp_path / "test", 1, start=200)
    assert load_dataset(tmp_path).test[:, 0, 0, 0].tolist() == [200]


def test_train_beside_other_folders_is_not_mixed_with_them(tmp_path):
    write_images(tmp_path / "train", 12)
    write_images(tmp_path / ".hidden", 12)
    assert len(load_dataset(tmp_path).train) == 11
    write_images(tmp_path / "holdout", 2)
    with pytest.raises(ValueError, match=r"expected one of test/, val/, .* beside train/, got holdout/"):
        load_dataset(tmp_path)


def test_hidden_folders_are_no_data(tmp_path):
    write_images(tmp_path / "a", 3)
    write_images(tmp_path / "a" / ".ipynb_checkpoints", 3, start=100)
    splits = load_dataset(tmp_path)
    assert len(splits.train) + len(splits.test) == 3


def test_the_root_may_begin_with_the_home_folder(digits, tmp_path, monkeypatch):
    write_mnist_like(tmp_path, "MNIST", digits)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("GENFAST_DATA", f"~/{tmp_path.name}")
    assert len(load_dataset("mnist").test) == 20
