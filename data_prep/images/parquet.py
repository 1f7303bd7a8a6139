"""The rows of a parquet file with a column of images and one of labels."""

import json
from collections.abc import Iterator
from typing import Any

from data_prep.images.raw import LABEL_FIELDS, RawImage, as_label
from data_prep.read.streams import File, seekable
from data_prep.read.suffixes import printable

BATCH_ROWS = 64
# What names of columns are taken for the image.
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "picture")


def class_names(file: File, label_field: str | None) -> tuple[str, ...]:
    """Return the names of the classes in the metadata of a parquet file as Hugging Face's datasets
    write it; () where there are none. Raises ValueError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with seekable(file) as raw:
        try:
            schema = pq.read_schema(raw)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file.path}: damaged: {error}; expected a whole parquet file, make it again"
            ) from error
    _, label = _columns(file, schema, label_field)
    found = _features(schema).get(label, {})
    names = found.get("names") if isinstance(found, dict) else None
    return tuple(printable(str(name)) for name in names) if isinstance(names, list) else ()


def _features(schema: Any) -> dict[str, Any]:
    """Return what Hugging Face's metadata says of each column."""
    try:
        value = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = value["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _columns(file: File, schema: Any, label_field: str | None) -> tuple[str, str]:
    """Return the names of the columns of images and of labels. Raises ValueError."""
    import pyarrow as pa

    features = _features(schema)

    def one(what: str, known: tuple[str, ...], fitting: list[str], advice: str) -> str:
        found = next((name for name in known if name in fitting), None)
        if found is None and len(fitting) == 1:
            found = fitting[0]
        if found is None:
            there = ", ".join(map(repr, fitting or schema.names)) or "none at all"
            raise ValueError(
                f"{file.path}: found {'no' if not fitting else 'several'} columns that may be the "
                f"{what}: {there}; {advice}"
            )
        return found

    def is_image(field: Any) -> bool:
        kind = field.type
        if pa.types.is_struct(kind):
            return any(kind.field(n).name == "bytes" for n in range(kind.num_fields))
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    images = [f.name for f in schema if features.get(f.name, {}).get("_type") == "Image"]
    images = images or [field.name for field in schema if is_image(field)]
    image = one("image", IMAGE_COLUMNS, images, "expected one of bytes, or a struct with bytes")
    if label_field:
        if label_field not in schema.names:
            there = ", ".join(map(repr, schema.names))
            raise ValueError(f"{file.path}: found no column {label_field!r}, but {there}")
        return image, label_field
    labels = [f.name for f in schema if features.get(f.name, {}).get("_type") == "ClassLabel"]
    labels = labels or [
        field.name
        for field in schema
        if pa.types.is_integer(field.type)
        or pa.types.is_string(field.type)
        or pa.types.is_large_string(field.type)
    ]
    return image, one("label", LABEL_FIELDS, labels, "name the column with --label-field")


def read_parquet(file: File, label_field: str | None) -> Iterator[tuple[RawImage, int]]:
    """Yield the rows of a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    names = class_names(file, label_field)
    with seekable(file) as raw:
        try:
            parquet = pq.ParquetFile(raw, buffer_size=1 << 20, pre_buffer=False)
            image, label = _columns(file, parquet.schema_arrow, label_field)
            rows = parquet.metadata.num_rows
            for batch in parquet.iter_batches(
                BATCH_ROWS, columns=[image, label], use_threads=False
            ):
                for value, word in zip(
                    batch.column(image).to_pylist(), batch.column(label).to_pylist(), strict=True
                ):
                    number += 1
                    place = f"{file.name}, row {number}"
                    yield _row(place, value, word, names), file.size * number // rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file.path}: damaged after row {number}: {error}; expected a whole parquet file, "
                "make it again"
            ) from error


def _row(place: str, value: Any, word: object, names: tuple[str, ...]) -> RawImage:
    """Make an image of a row; a number becomes the name of its class where names are told."""
    path = ""
    if isinstance(value, dict):
        path, value = str(value.get("path") or ""), value.get("bytes")
    label = as_label(place, word)
    if names and isinstance(label, int):
        if not 0 <= label < len(names):
            raise ValueError(
                f"{place}: label {label} has no class, for the file names {len(names):,}: "
                f"{names[0]!r} to {names[-1]!r}; leave rows without a label out"
            )
        label = names[label]
    data = value if isinstance(value, bytes) else None
    return RawImage(place, printable(path), label, data, "", len(data or b""))
