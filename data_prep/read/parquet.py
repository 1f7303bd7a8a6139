"""The rows of a parquet file."""

from collections.abc import Iterator
from typing import Any

from data_prep.read.raw import Finding, Text, cut_parts
from data_prep.read.streams import File, seekable

BATCH_ROWS = 256


def read_rows(file: File, text_field: str) -> Iterator[tuple[Text | Finding, int]]:
    """Yield the text of each row, and how many of the file's bytes were read by then.

    A row is read whole, as the library does, and cut where it is too large.

    Raises ValueError naming the file if it is damaged or has no string column `text_field`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    with seekable(file) as raw:
        try:
            # A column of a row group as a stream, not whole.
            parquet = pq.ParquetFile(raw, buffer_size=1 << 20, pre_buffer=False)
            rows = parquet.metadata.num_rows
            _check_column(file, parquet.schema_arrow, text_field)
            for batch in parquet.iter_batches(BATCH_ROWS, columns=[text_field], use_threads=False):
                # Of a name with a dot the library takes all columns that begin with what stands
                # before it.
                column = batch.column(batch.schema.get_field_index(text_field))
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                for value in column.cast(pa.large_binary()).to_pylist():
                    row += 1
                    for item in (
                        [Text(file.name, row, None)]
                        if value is None
                        else cut_parts(file.name, row, [value])
                    ):
                        yield item, file.size * row // rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file.path}: damaged after row {row}: {error}; expected a whole parquet file, "
                "make it again"
            ) from error


def _check_column(file: File, schema: Any, text_field: str) -> None:
    import pyarrow as pa

    if (same := schema.names.count(text_field)) > 1:
        raise ValueError(
            f"{file.path}: found {same} columns {text_field!r}, expected one; rename the others, "
            "or name the column of the text with --text-field"
        )
    if not same:
        raise ValueError(
            f"{file.path}: found no column {text_field!r}, but "
            f"{', '.join(map(repr, schema.names)) or 'none at all'}; name the column of the text "
            "with --text-field"
        )
    kind = schema.field(text_field).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if value not in (
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
    ):
        raise ValueError(
            f"{file.path}: found column {text_field!r} of type {kind}, expected string; "
            "name the column of the text with --text-field"
        )
