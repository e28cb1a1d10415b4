"""Every way to hand over an image gives the same pixels; everything else is refused by name."""

import base64
import copy
import http.server
import io
import itertools
import re
import struct
import subprocess
import sys
import threading
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from vlmoe.processing.image_checks import load_rgb_image
from vlmoe.processing.image_sources import FORMATS, ImageError, ImageLimits

HUGE = (20_000, 20_000)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def huge_png() -> bytes:
    """The header of a 20,000 x 20,000 PNG, and hardly any pixels."""
    header = struct.pack(">IIBBBBB", *HUGE, 1, 0, 0, 0, 0)
    return png_file([(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 99)), (b"IEND", b"")])


def png_file(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG of these chunks."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a local server of the files in `tmp_path`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_every_source_gives_the_same_pixels(processor, make_image, tmp_path, served):
    image = make_image()
    pixels, content = np.array(image), encoded(image)
    path = tmp_path / "image.png"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()
    sources = {
        "PIL": image,
        "opened": Image.open(path),
        "path": path,
        "string": str(path),
        "URL": f"{served}/image.png",
        "bytes": content,
        "base64": text,
        "base64 with line breaks": "\n".join(text[i : i + 60] for i in range(0, len(text), 60)),
        "data URL": f"data:image/png;base64,{text}",
        "undecoded column": {"bytes": content, "path": None},
        "undecoded path": {"bytes": None, "path": str(path)},
        "array": pixels,
        "array, channels first": pixels.transpose(2, 0, 1),
        "array of 0..1": pixels / 255,
        "array of 0..255": pixels.astype(np.float32),
        "tensor": torch.from_numpy(pixels).permute(2, 0, 1),
        "tensor, channels last": torch.from_numpy(pixels),
        "half tensor": torch.from_numpy(pixels / 255).to(torch.float16),
        "integer tensor": torch.from_numpy(pixels).long(),
        "parameter": torch.from_numpy(pixels / 255).requires_grad_(),
    }
    wanted = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
    for name, source in sources.items():
        output = processor(images=source, text="<image>", return_tensors="pt")
        assert torch.equal(output["pixel_values"], wanted), name


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "HSV"])
@pytest.mark.parametrize("size", [(1, 1), (20, 24)])
def test_every_mode_is_converted_to_rgb(processor, make_image, mode, size):
    output = processor(images=make_image(size=size, mode=mode), text="<image>")
    assert output["pixel_values"].shape[2] == 3
    assert output["pixel_values"].isfinite().all()


@pytest.mark.parametrize("splitting", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (4, 4), (1, 2000), (2000, 1)])
def test_extreme_shapes_work(processor, make_image, size, splitting):
    image = make_image(size=size)
    options = {"text": "<image>", "do_image_splitting": splitting, "return_tensors": "pt"}
    wanted = processor(images=image, **options)["pixel_values"]
    assert torch.equal(processor(images=np.array(image), **options)["pixel_values"], wanted)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(processor(images=tensor, **options)["pixel_values"], wanted)


def test_a_single_pixel_keeps_its_colour(processor):
    pixel = Image.new("RGB", (1, 1), (255, 0, 51))
    output = processor(images=pixel, text="<image>", return_tensors="pt")["pixel_values"]
    wanted = torch.tensor([1.0, -1.0, -0.6]).view(3, 1, 1).expand_as(output[0, 0])
    torch.testing.assert_close(output[0, 0], wanted)


def test_transparency_is_laid_on_white(make_image):
    image = make_image(mode="RGBA")
    alpha = np.array(image)[..., 3:] / 255
    wanted = np.array(image)[..., :3] * alpha + 255 * (1 - alpha)
    for source in (image, encoded(image), np.array(image), np.array(image).transpose(2, 0, 1)):
        loaded = np.array(load_rgb_image(source, "x"), dtype=float)
        assert np.abs(loaded - wanted).max() <= 1
    palette = Image.new("P", (2, 2))
    palette.info["transparency"] = 0
    assert np.array(load_rgb_image(palette, "x")).min() == 255


def test_grey_arrays_become_rgb(make_image):
    grey = np.array(make_image(mode="L"))
    wanted = np.repeat(grey[..., None], 3, axis=2)
    for source in (grey, grey[None], grey[..., None], grey.astype(np.uint16) << 8, grey > -1):
        loaded = np.array(load_rgb_image(source, "x"))
        assert np.array_equal(loaded, wanted if source.dtype != bool else np.full_like(wanted, 255))


def test_sixteen_bit_images_are_scaled_not_clipped(make_image):
    grey = np.array(make_image(mode="L"))
    deep = Image.fromarray(grey.astype(np.uint16) << 8)
    assert deep.mode == "I;16"
    assert np.array_equal(np.array(load_rgb_image(deep, "x"))[..., 0], grey)
    assert np.array_equal(np.array(load_rgb_image(encoded(deep), "x"))[..., 0], grey)


def test_exif_orientation_is_applied(make_image):
    image, exif = make_image(size=(3, 5)), Image.Exif()
    exif[0x0112] = 6
    loaded = load_rgb_image(encoded(image, exif=exif), "x")
    assert np.array_equal(np.array(loaded), np.array(image.transpose(Image.Transpose.ROTATE_270)))
    assert loaded.size == ImageOps.exif_transpose(image).size[::-1]


def test_prepared_floats_are_not_rounded(processor, tiny_config):
    side = tiny_config().vision_config.image_size
    prepared = torch.linspace(0, 1, 3 * side * side).view(3, side, side)
    options = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    output = processor(images=prepared, text="<image>", **options)["pixel_values"][0, 0]
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, prepared, atol=1 / 255, rtol=0)
    nested = processor(images=prepared, text="<image>", images_kwargs=options)["pixel_values"]
    assert torch.equal(torch.as_tensor(nested)[0, 0], output)


def test_prepared_floats_can_be_tiled(processor):
    prepared = np.random.default_rng(0).random((3, 300, 200), dtype=np.float32)
    output = processor(images=prepared, text="<image>", do_rescale=False, do_image_splitting=True)[
        "pixel_values"
    ]
    assert output.shape[1] == 4 * 3 + 1


def test_input_data_format_settles_where_the_channels_are():
    array = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    last = np.array(load_rgb_image(array, "x"))
    first = np.array(load_rgb_image(array, "x", channels="channels_first"))
    assert np.array_equal(last, array)
    assert np.array_equal(first, array.transpose(1, 2, 0))
    assert np.array_equal(np.array(load_rgb_image(torch.from_numpy(array), "x")), first)


FORMS = ["path", "string", "bytes", "base64", "opened"]
KINDS = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]
NOT_EVEN_OPENED_BY_PIL = ("WEBP", "opened")


@pytest.mark.parametrize(
    ("kind", "form"),
    [pair for pair in itertools.product(KINDS, FORMS) if pair != NOT_EVEN_OPENED_BY_PIL],
)
def test_a_truncated_image_names_the_sample(processor, make_image, tmp_path, kind, form):
    content = encoded(make_image(size=(64, 64)), kind)
    path = tmp_path / "image"
    path.write_bytes(content[: len(content) // 2])
    if form == "opened":
        source: object = Image.open(path)
    else:
        source = {
            "path": path,
            "string": str(path),
            "bytes": path.read_bytes(),
            "base64": base64.b64encode(path.read_bytes()).decode(),
        }[form]
    good = make_image()
    with pytest.raises(ImageError, match=r"sample 1, image 1: .* cannot be decoded") as caught:
        processor(images=[[good], [good, source]], text=["<image>", "<image><image>"])
    assert caught.value.__cause__ is not None
    assert "Replace the image" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", r"is empty \(0 bytes\)"), (b"not an image", "cannot be decoded")],
)
def test_a_file_without_an_image_names_the_sample_and_the_file(
    processor, tmp_path, content, message
):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    for source in (path, str(path)):
        with pytest.raises(ValueError, match=f"sample 0, image 0: the file .*broken.png {message}"):
            processor(images=source, text="<image>")
    for given in (content, {"bytes": content, "path": "broken.png"}):
        with pytest.raises(ValueError, match=f"sample 0, image 0: .* bytes {message}"):
            processor(images=given, text="<image>")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing/photo.jpg", "'missing/photo.jpg' is neither an existing file nor"),
        (Path("missing/photo.jpg"), "there is no file missing/photo.jpg"),
        ("", r"is empty \(0 bytes\)"),
        (7, "got int 7. Allowed: PIL image"),
        ({"path": None}, "got NoneType None. Allowed: PIL image"),
        (np.zeros((5, 5, 2), np.uint8), r"the array of shape \(5, 5, 2\) is no image"),
        (np.zeros(5, np.uint8), r"the array of shape \(5,\) is no image"),
        (np.zeros((0, 4, 3), np.uint8), "has no pixels"),
        (np.full((4, 4, 3), 300), "of dtype int64 cannot be read as pixels"),
        (np.full((4, 4, 3), "a"), "of dtype <U1 cannot be read as pixels"),
        (np.full((4, 4, 3), -0.5), r"values from -0.5 to -0.5; allowed: 0 to 1, or 0 to 255"),
        (torch.full((3, 4, 4), 1e9), "values from 1e"),
        (torch.zeros(3, 4, 4, device="meta"), "cannot be decoded"),
    ],
)
def test_what_is_no_image_is_refused_by_name(processor, make_image, source, message):
    with pytest.raises(ImageError, match=f"sample 1, image 0: .*{message}"):
        processor(images=[[make_image()], [source]], text=["<image>", "<image>"])


def test_a_dead_url_names_the_sample(processor, served):
    for url in (f"{served}/missing.png", "http://127.0.0.1:9/image.png"):
        with pytest.raises(ImageError, match=f"sample 0, image 0: the image at {url}"):
            processor(images=url, text="<image>")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rescale", [True, False])
def test_nan_pixels_name_the_sample(processor, bad, rescale):
    array = np.full((6, 6, 3), 0.5, dtype=np.float32)
    array[2, 3, 1] = bad
    deep = Image.fromarray(array[..., 1])
    for source in (array, torch.from_numpy(array).permute(2, 0, 1), torch.from_numpy(array), deep):
        message = "sample 0, image 1: .* has 1 NaN or infinite pixel values"
        with pytest.raises(ImageError, match=message):
            processor(
                images=[[np.zeros((6, 6, 3)), source]],
                text="<image><image>",
                do_rescale=rescale,
            )


def test_a_huge_image_is_refused_without_being_decoded(processor, tmp_path, served, monkeypatch):
    path = tmp_path / "huge.png"
    path.write_bytes(huge_png())
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        opened = Image.open(path)
    sources = {
        "file": path,
        "string": str(path),
        "bytes": path.read_bytes(),
        "base64": base64.b64encode(path.read_bytes()).decode(),
        "URL": f"{served}/huge.png",
        "opened": opened,
        "array": np.broadcast_to(np.uint8(0), (*HUGE, 3)),
        "tensor": torch.zeros(1, 1, 1).expand(3, *HUGE),
    }
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.size))
    for name, source in sources.items():
        message = r"sample 0, image 0: .*(400000000 pixels|20000x20000)"
        with pytest.raises(ImageError, match=message):
            processor(images=source, text="<image>")
        assert not decoded, name


def test_the_processors_limits_decide_what_is_too_large(processor, make_image):
    image = make_image(size=(20, 30))
    content = encoded(image)
    sources = (image, content, np.asarray(image), torch.from_numpy(np.array(image)))
    for limits, refused in (
        ((599, 100), True),
        ((600, 29), True),
        ((600, 30), False),
    ):
        limited = copy.copy(processor)
        limited.max_image_pixels, limited.max_image_side = limits
        for source in sources:
            if refused:
                message = r"sample 0, image 0: .* is 20x30 pixels; the limit is .*max_image_pixels"
                with pytest.raises(ImageError, match=message):
                    limited(images=source, text="<image>")
            else:
                limited(images=source, text="<image>")


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_the_formats_are_decoded_and_their_headers_checked(make_image, kind, monkeypatch):
    image = make_image(size=(40, 30))
    content = encoded(image, kind)
    loaded = load_rgb_image(content, "x")
    assert loaded.size == image.size
    assert np.array_equal(
        np.array(loaded), np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    )
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self))
    for limits in (ImageLimits(max_pixels=1199), ImageLimits(max_side=39)):
        with pytest.raises(ImageError, match=r"x: .* is 40x30 pixels; the limit is"):
            load_rgb_image(content, "x", limits=limits)
    assert not decoded


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICO", "TGA", "PCX", "PDF"])
def test_other_formats_are_refused_without_being_opened(make_image, kind):
    with pytest.raises(
        ImageError, match=r"cannot be decoded .* Allowed: PNG, JPEG, WEBP, GIF, BMP"
    ):
        load_rgb_image(encoded(make_image(), kind), "x")


def test_an_opened_eps_is_not_decoded(make_image, monkeypatch):
    opened = Image.open(io.BytesIO(encoded(make_image(), "EPS")))
    monkeypatch.setattr(
        "PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: pytest.fail("ran")
    )
    with pytest.raises(ImageError, match=r"x: .* format EPS.* Allowed: PNG"):
        load_rgb_image(opened, "x")


def black_png(width: int, height: int) -> bytes:
    """A 1-bit PNG that decodes: a few kB for millions of pixels."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    return png_file([(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")])


def test_bombs_are_refused_within_little_memory(tmp_path):
    sizes = [(13_000, 13_000), (100_000_000, 1), (1, 70_000)]
    for number, content in enumerate([*(black_png(*size) for size in sizes), huge_png()]):
        (tmp_path / f"{number}.png").write_bytes(content)
    assert (tmp_path / "0.png").stat().st_size < 50_000
    with open(tmp_path / "sparse.png", "wb") as file:
        file.write(black_png(1, 1))
        file.truncate(1 << 40)
    code = """
import resource, sys, warnings
from pathlib import Path
from vlmoe.processing.image_checks import ImageError, load_rgb_image
warnings.simplefilter("ignore")
load_rgb_image(Path(sys.argv[2]), "small")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).glob("*.png")):
    for source in (path, str(path), path.read_bytes() if path.name != "sparse.png" else path):
        try:
            load_rgb_image(source, "row 3")
        except ImageError as error:
            print(error)
        else:
            print("decoded", path)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    small = tmp_path / "small" / "a.png"
    small.parent.mkdir()
    small.write_bytes(black_png(8, 8))
    argv = [sys.executable, "-c", code, str(tmp_path), str(small)]
    run = subprocess.run(argv, capture_output=True, text=True, check=True)
    *messages, megabytes = run.stdout.splitlines()
    assert len(messages) == 15
    assert all(re.search("^row 3: .*(limit|too large)", message) for message in messages), messages
    assert int(megabytes) < 200


def test_images_of_a_call_are_decoded_one_at_a_time(processor, make_image, monkeypatch):
    opened: list[weakref.ref] = []

    def load(*args: object, **options: object) -> object:
        assert not any(each() is not None for each in opened)
        image = load_rgb_image(*args, **options)
        opened.append(weakref.ref(image))
        return image

    monkeypatch.setattr("vlmoe.processing.processing_vlmoe.load_rgb_image", load)
    sources = [encoded(make_image(seed)) for seed in range(4)]
    processor(images=[sources[:3], sources[2:]], text=["<image>" * 3, "<image>" * 2])
    assert len(opened) == 4


def test_the_limits_are_saved_with_the_processor(processor, tmp_path):
    limited = copy.copy(processor)
    limited.max_image_pixels, limited.max_image_side = 1000, 500
    limited.save_pretrained(tmp_path)
    assert type(processor).from_pretrained(tmp_path).image_limits == ImageLimits(1000, 500)
    assert processor.image_limits == ImageLimits(64_000_000, 32_768)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many"])
def test_limits_are_whole_numbers_above_zero(value):
    with pytest.raises(ValueError, match=r"`max_image_side` is .*; allowed: 1 or more"):
        ImageLimits(max_side=value)


def test_the_callers_image_is_not_changed(make_image):
    image = make_image(mode="P")
    before = image.tobytes()
    load_rgb_image(image, "x")
    assert (image.mode, image.tobytes()) == ("P", before)
