"""All documents of some input, read the way the pipeline does it but in this process."""

from pathlib import Path

from data_prep.read.documents import Document, Findings, read_documents
from data_prep.read.inputs import find_sources, plan_units
from data_prep.read.pieces import Piece, read_pieces


def pieces_of(*inputs: str | Path, text_field: str = "text") -> list[Piece]:
    """The pieces of all units, in order."""
    return [
        piece
        for unit in plan_units(find_sources(inputs))
        for piece in read_pieces(unit, text_field)
    ]


def read(
    *inputs: str | Path, text_field: str = "text", strict: bool = False
) -> tuple[list[Document], dict[str, int], list[dict[str, object]]]:
    """Documents, counts of findings by kind, and their records."""
    documents: list[Document] = []
    every = Findings()
    for piece in pieces_of(*inputs, text_field=text_field):
        findings = Findings()
        documents += read_documents(piece, text_field, findings, strict)
        every.counts += findings.counts
        every.records += findings.records
    return documents, dict(every.counts), every.records


def texts_of(*inputs: str | Path, text_field: str = "text") -> list[str]:
    """The texts alone."""
    return [document.text for document in read(*inputs, text_field=text_field)[0]]
