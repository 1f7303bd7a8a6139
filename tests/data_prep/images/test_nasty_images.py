"""Images as they lie about: broken, huge, of odd kinds. Each is counted, none ends the run."""

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.images.decode import Encoding, prepare_image
from data_prep.images.findings import KINDS, Unusable
from data_prep.images.verify import verify
from testbed.images import class_folders, drawn, encoded, prepared, stored

PICTURE = drawn(2, 1, 64)
AS_IT_IS = Encoding(None, None, 95)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    """A PNG by hand: whatever its header says."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(pixels, 9))
    return b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND", b"")


def bomb() -> bytes:
    """A PNG of 500 megapixels, black, of 1 bit each: 61 kB."""
    width, height = 25_000, 20_000
    packer = zlib.compressobj(9)
    rows = b"\0" * (1 + width // 8)
    packed = b"".join(packer.compress(rows) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(PICTURE.resize((64, 40)), "JPEG", exif=exif)


def animated(kind: str) -> bytes:
    frames = [drawn(0, number, 48) for number in range(3)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


JPEG, PNG, WEBP = (encoded(PICTURE, suffix) for suffix in ("jpg", "png", "webp"))
GREY16 = Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16)
# name: (content, the kinds that are found)
NASTY: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "empty.jpg": (lambda: b"", ["empty"]),
    "text.jpg": (lambda: b"<html>404 not found</html>", ["not_image"]),
    "half.jpg": (lambda: JPEG[: len(JPEG) // 2], ["truncated"]),
    "half.png": (lambda: PNG[: len(PNG) // 2], ["truncated"]),
    "half.webp": (lambda: WEBP[: len(WEBP) // 2], ["truncated"]),
    "begun.jpg": (lambda: JPEG[:20], ["truncated", "damaged"]),
    "altered.png": (lambda: PNG[:200] + b"\0" * 60 + PNG[260:], ["damaged", "truncated"]),
    "bomb.png": (bomb, ["too_many_pixels"]),
    "claims.png": (lambda: png(60_000, 60_000), ["too_many_pixels"]),
    "no_width.png": (lambda: png(0, 10), ["zero_sized"]),
    "no_height.png": (lambda: png(10, 0), ["zero_sized"]),
    "float.tif": (lambda: saved(Image.new("F", (8, 8)), "TIFF"), ["other_mode"]),
    "cmyk.jpg": (lambda: saved(PICTURE.convert("CMYK"), "JPEG"), ["cmyk"]),
    "deep.png": (lambda: saved(GREY16, "PNG"), ["sixteen_bit"]),
    "deep_rgb.png": (lambda: png(2, 1, b"\0" + bytes(range(12)), depth=16), ["sixteen_bit"]),
    "moving.gif": (lambda: animated("GIF"), ["animated", "other_format"]),
    "moving.png": (lambda: animated("PNG"), ["animated"]),
    "moving.webp": (lambda: animated("WEBP"), ["animated"]),
    "turned.jpg": (lambda: turned(6), ["exif_rotated"]),
    "bitmap.bmp": (lambda: saved(PICTURE, "BMP"), ["other_format"]),
    "tagged.tif": (lambda: saved(PICTURE, "TIFF"), ["other_format"]),
    "palette.png": (lambda: saved(PICTURE.convert("P"), "PNG"), ["palette"]),
    "clear.png": (lambda: saved(PICTURE.convert("RGBA"), "PNG"), ["alpha"]),
    "really_a.jpg": (lambda: PNG, ["wrong_suffix"]),
    "grey.jpg": (lambda: saved(PICTURE.convert("L"), "JPEG"), []),
    "one_bit.png": (lambda: saved(PICTURE.convert("1"), "PNG"), []),
    "progressive.jpg": (lambda: saved(PICTURE, "JPEG", progressive=True), []),
}


@pytest.mark.parametrize("name", NASTY)
def test_what_is_odd_is_found_by_its_kind(name: str) -> None:
    make, kinds = NASTY[name]
    data = make()
    try:
        ready = prepare_image(data, name, AS_IT_IS)
    except Unusable as error:
        assert error.kind in kinds and KINDS[error.kind][0] == "dropped"
        assert len(error.detail) < 250 and "0x" not in error.detail
        return
    found = sorted(kind for kind, _ in ready.found)
    assert found == sorted(kinds)
    if all(KINDS[kind][0] == "kept" for kind in found):
        assert ready.data == data
    again = prepare_image(ready.data, "", AS_IT_IS)
    assert again.data == ready.data and again.pixels == ready.pixels
    assert not [kind for kind, _ in again.found if KINDS[kind][0] != "kept"]


def test_what_is_converted_looks_as_it_should() -> None:
    turned_up = Image.open(io.BytesIO(prepare_image(turned(6), "", AS_IT_IS).data))
    assert turned_up.size == (40, 64) and turned_up.getexif().get(0x0112, 1) == 1
    cmyk = Image.open(io.BytesIO(prepare_image(NASTY["cmyk.jpg"][0](), "", AS_IT_IS).data))
    assert cmyk.mode == "RGB" and cmyk.format == "JPEG"
    assert abs(np.asarray(cmyk, int) - np.asarray(PICTURE, int)).mean() < 12
    deep = Image.open(io.BytesIO(prepare_image(NASTY["deep.png"][0](), "", AS_IT_IS).data))
    assert np.array_equal(np.asarray(deep), np.asarray(GREY16) >> 8)
    first = Image.open(io.BytesIO(prepare_image(animated("WEBP"), "", AS_IT_IS).data))
    assert first.format == "PNG" and first.size == (48, 48)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_shrinking_and_another_format(suffix: str) -> None:
    data = encoded(drawn(0, 0, 100).resize((150, 100)), suffix)
    small = prepare_image(data, "", Encoding(50, None, 90))
    image = Image.open(io.BytesIO(small.data))
    assert image.size == (75, 50) == (small.pixels.width, small.pixels.height)
    assert image.format == {"png": "PNG", "jpg": "JPEG", "webp": "PNG"}[suffix]
    assert prepare_image(data, "", Encoding(100, None, 90)).data == data
    web = prepare_image(data, "", Encoding(None, "webp", 80))
    assert Image.open(io.BytesIO(web.data)).format == "WEBP"
    assert prepare_image(data, "", Encoding(None, "webp", 80)) == web


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([JPEG, PNG, WEBP]), st.data())
def test_whatever_is_altered_is_kept_or_unusable(whole: bytes, data: st.DataObject) -> None:
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    try:
        ready = prepare_image(bytes(raw), "a.png", AS_IT_IS)
    except Unusable as error:
        assert KINDS[error.kind][0] == "dropped"
    else:
        with Image.open(io.BytesIO(ready.data)) as image:
            assert image.convert("RGB").size == (ready.pixels.width, ready.pixels.height)


def nasty_folder(folder: Path) -> Path:
    class_folders(folder, 12)
    for name, (make, _) in NASTY.items():
        (folder / "disc" / name).write_bytes(make())
    (folder / "disc" / "notes.txt").write_text("not an image")
    (folder / "disc" / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "lost.png").write_bytes(PNG)
    return folder


def test_a_folder_of_them(tmp_path: Path) -> None:
    source = nasty_folder(tmp_path / "in")
    out = tmp_path / "out"
    manifest, said = prepared([source], out, val_fraction=0)
    found = manifest.sources[0].findings
    for kind in {kinds[0] for _, kinds in NASTY.values() if kinds}:
        assert found[kind] >= 1, kind
    assert (found["other_suffix"], found["dead_link"], found["no_class"]) == (1, 1, 1)
    dropped = sum(count for kind, count in found.items() if KINDS[kind][0] == "dropped")
    assert manifest.splits["train"].images == 12 + len(NASTY) - dropped
    named = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    places = {each["file"]: each["kind"] for each in named}
    assert places["in/disc/bomb.png"] == "too_many_pixels"
    assert places["in/disc/half.jpg"] == "truncated"
    assert {each["action"] for each in named} == {"dropped", "converted", "passed over"}
    assert f"dropped   {dropped}: " in said
    assert verify(out) == []
    assert (source / "disc" / "palette.png").read_bytes() in stored(out, manifest, "train")


def test_strict_stops_at_the_first(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", 12)
    (source / "bar" / "00000.png").write_bytes(PNG[:300])
    with pytest.raises(ValueError, match=r"in/bar/00000\.png: truncated: .*leave out --strict"):
        prepared([source], tmp_path / "out", strict=True, val_fraction=0)


@pytest.mark.slow
def test_memory_stays_below_a_gigabyte_with_a_bomb(tmp_path: Path) -> None:
    """The bomb, and the largest image that is decoded, of the mode that takes most."""
    source = class_folders(tmp_path / "in", 6)
    (source / "bar" / "bomb.png").write_bytes(bomb())
    Image.new("RGBA", (8192, 8192), (9, 8, 7, 6)).save(source / "bar" / "large.png")
    code = (
        "import sys; from pathlib import Path\n"
        "from testbed.images import prepared; from testbed.peak import peak_kb\n"
        "prepared([Path(sys.argv[1])], Path(sys.argv[2]), val_fraction=0)\n"
        "print(peak_kb())"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1_000_000, f"{int(done.stdout):,} kB"
