from __future__ import annotations

import io
import os

import numpy as np
import pytest
from PIL import Image, ImageCms

from diffusers_ext.core import pictures
from diffusers_ext.core.pictures import find_pictures, read_picture, rgb_picture


@pytest.fixture(autouse=True)
def every_warning_is_told():
    pictures._warn_once.cache_clear()


def square(inner, outer, dtype=np.uint8):
    """A 16 x 16 picture whose middle is `inner`."""
    pixels = np.zeros((16, 16, *np.shape(inner)), dtype)
    pixels[:] = outer
    pixels[4:12, 4:12] = inner
    return pixels


def corner_and_middle(picture):
    assert picture.mode == "RGB"
    return picture.getpixel((0, 0)), picture.getpixel((8, 8))


def test_what_is_transparent_is_white_whatever_hides_there(tmp_path):
    rgba = Image.fromarray(square((10, 20, 30, 255), (200, 0, 0, 0)))
    la = Image.fromarray(square((10, 255), (90, 0)))
    palette = Image.fromarray(square(1, 0))
    palette.putpalette([200, 0, 0, 10, 20, 30])
    for name, image, options, middle in (
        ("rgba.png", rgba, {}, (10, 20, 30)),
        ("rgba.webp", rgba, {"lossless": True, "exact": True}, (10, 20, 30)),
        ("rgba.tif", rgba, {}, (10, 20, 30)),
        ("la.png", la, {}, (10, 10, 10)),
        ("p.png", palette, {"transparency": 0}, (10, 20, 30)),
        ("p.gif", palette, {"transparency": 0}, (10, 20, 30)),
        ("rgb.png", rgba.convert("RGB"), {"transparency": (200, 0, 0)}, (10, 20, 30)),
        ("l.png", Image.fromarray(square(10, 90)), {"transparency": 90}, (10, 10, 10)),
        ("16.png", Image.fromarray(square(2570, 9, np.uint16)), {"transparency": 9}, (10, 10, 10)),
    ):
        image.save(tmp_path / name, **options)
        found = corner_and_middle(read_picture(tmp_path / name))
        assert found == ((255, 255, 255), middle), name
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert rgb_picture(half).getpixel((0, 0)) == (127, 127, 127)
    assert rgb_picture(rgba.convert("RGBa")).getpixel((0, 0)) == (255, 255, 255)
    assert rgb_picture(la.convert("La")).getpixel((8, 8)) == (10, 10, 10)


def test_deep_pictures_are_rescaled(tmp_path):
    deep = square(50000, 20000, np.uint16)
    shown = ((78, 78, 78), (195, 195, 195))
    Image.fromarray(deep).save(tmp_path / "i16.png")
    Image.fromarray(deep).save(tmp_path / "i16.tif")
    Image.fromarray(deep.astype(np.int32)).save(tmp_path / "i32.tif")
    Image.fromarray((deep / 65535).astype(np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(65535 - deep).save(tmp_path / "white_is_zero.tif", tiffinfo={262: 0})
    for path in sorted(tmp_path.iterdir()):
        assert corner_and_middle(read_picture(path)) == shown, path
    big = Image.frombytes("I;16B", (16, 16), deep.astype(">u2").tobytes())
    assert corner_and_middle(rgb_picture(big)) == shown


@pytest.mark.parametrize("values", [[300.0, 0.0], [-1.0, 0.5], [float("nan"), 0.5]])
def test_floats_of_an_unknown_range_are_refused(tmp_path, values):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match=r"f\.tif must be a picture, .* must lie in 0 \.\.\. 1"):
        read_picture(tmp_path / "f.tif")


def swapped_profile():
    """An RGB profile that calls red what sRGB calls blue."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    entries = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, blue = entries[b"rXYZ"], entries[b"bXYZ"]
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "Swap".encode("utf-16-be"))


def test_a_colour_profile_is_applied_unless_it_is_plain(tmp_path, caplog):
    image = Image.fromarray(square((250, 0, 0), (0, 250, 0)))
    image.save(tmp_path / "swapped.png", icc_profile=swapped_profile())
    _, middle = corner_and_middle(read_picture(tmp_path / "swapped.png"))
    assert middle[2] > 240
    assert middle[0] < 15
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "plain.png", icc_profile=plain)
    assert read_picture(tmp_path / "plain.png").tobytes() == image.tobytes()
    assert not caplog.records
    image.save(tmp_path / "broken.png", icc_profile=b"no profile")
    Image.new("L", (4, 4), 9).save(tmp_path / "wrong.png", icc_profile=plain)
    assert read_picture(tmp_path / "broken.png").tobytes() == image.tobytes()
    assert read_picture(tmp_path / "wrong.png").getpixel((0, 0)) == (9, 9, 9)
    for name in ("broken.png", "wrong.png"):
        assert f"{name} is passed over" in caplog.text


def test_cmyk_without_a_profile_says_that_its_colours_are_a_guess(tmp_path, caplog):
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "print.jpg")
    for _ in range(2):
        assert min(read_picture(tmp_path / "print.jpg").getpixel((0, 0))) > 250
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "print.jpg is CMYK without a colour profile" in caplog.text


@pytest.mark.parametrize("mode", ["1", "YCbCr", "HSV", "LAB", "RGBX"])
def test_other_modes_are_read(mode):
    assert rgb_picture(Image.new("RGB", (4, 4), "white").convert("RGB" if mode == "LAB" else mode))


def test_a_plain_picture_stays_to_the_bit():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8))
    found = rgb_picture(image)
    assert found.tobytes() == image.tobytes()
    assert found is not image


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_frame_is_read_with_a_word(tmp_path, caplog, suffix):
    first, second = Image.new("RGB", (8, 8), "black"), Image.new("RGB", (8, 8), "white")
    path = tmp_path / f"moving.{suffix}"
    first.save(path, save_all=True, append_images=[second])
    assert read_picture(path).getpixel((0, 0)) == (0, 0, 0)
    assert f"moving.{suffix} has 2 frames: the first one is read." in caplog.text


def test_damaged_files_are_refused_by_name(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for suffix in ("png", "jpg", "webp", "gif", "tif", "bmp", "avif"):
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
        for name, content in (("empty", b""), ("half", stream.getvalue()[: stream.tell() // 2])):
            path = tmp_path / f"{name}.{suffix}"
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"{path.name} must be a picture, got "):
                read_picture(path)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png must be a picture"):
        read_picture(tmp_path / "text.png")


def test_bombs_are_refused(tmp_path, monkeypatch):
    Image.new("1", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(ValueError, match=r"bomb\.png must be a picture.*10000 pixels"):
        read_picture(tmp_path / "bomb.png")


def test_what_no_installed_package_reads_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(pictures.features, "check", lambda name: False)
    for brand, package in ((b"heic", "pillow-heif"), (b"mif1", "pillow-heif"), (b"avif", "pillow")):
        (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0" * 9)
        with pytest.raises(ValueError, match=rf"a\.jpg must be of a format .*{package}"):
            read_picture(tmp_path / "a.jpg")


def test_heic_is_read_where_its_package_is(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (32, 32), "white")).save(tmp_path / "a.heic")
    assert min(read_picture(tmp_path / "a.heic").getpixel((5, 5))) > 250


def test_other_entries_are_passed_over_with_a_count(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.tiff", "d.avif"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name in ("._a.jpg", ".DS_Store", "Thumbs.db", "notes.md", "raw.cr2"):
        (tmp_path / name).write_bytes(b"\0")
    (tmp_path / "more").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.png")
    found = find_pictures(tmp_path)
    assert [path.name for path in found.paths] == ["a.jpg", "b.PNG", "c.tiff", "d.avif"]
    summary = found.summary()
    assert summary.startswith(f"Reading 4 pictures of 12 entries of {tmp_path}; passed over: ")
    assert "3 hidden or of the system (.DS_Store, ._a.jpg, Thumbs.db)" in summary
    assert "2 of another format (notes.md, raw.cr2)" in summary
    assert "1 folders (more)" in summary
    assert "2 links to nothing or no plain files (gone.png, pipe.png)" in summary


def test_folders_without_pictures_are_refused(tmp_path):
    (tmp_path / "._a.jpg").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"must hold pictures .*png.*, got none.*\._a\.jpg"):
        find_pictures(tmp_path)
    with pytest.raises(ValueError, match="`pictures` must be a folder of pictures, got "):
        find_pictures(tmp_path / "missing", "pictures")
