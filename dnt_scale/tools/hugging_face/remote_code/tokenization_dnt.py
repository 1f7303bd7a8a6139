"""A SentencePiece model as a tokenizer of transformers, run by SentencePiece itself: ids are those
that dnt-scale's `dnt data prepare` gives.
"""

from pathlib import Path
from shutil import copyfile
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

PART_CHARS = 1 << 14  # as dnt-scale cuts long documents
SPACE_MARK = "\u2581"  # SentencePiece writes a space as this; a real one goes in as its bytes


class DNTTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self.vocab_file = vocab_file
        self.sp = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        byte_ids = [self.sp.PieceToId(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        known = all(self.sp.IsByte(number) for number in byte_ids)
        self.mark = [self.sp.IdToPiece(number) for number in byte_ids] if known else []
        self.splits = self.sp.Decode(self.sp.Encode("a\n") + self.sp.Encode(" b\n")) == "a\n b\n"
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return int(self.sp.vocab_size())

    def get_vocab(self) -> dict[str, int]:
        ours = {self.sp.IdToPiece(number): number for number in range(self.vocab_size)}
        return {**ours, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        if not self.splits:
            return self._pieces(text)
        found: list[str] = []
        start = 0
        while start < len(text):
            end = len(text)
            if end - start > PART_CHARS:
                end = text.rfind("\n", start, start + PART_CHARS) + 1 or start + PART_CHARS
            marked = text[start:end].split(SPACE_MARK) if self.mark else [text[start:end]]
            for number, part in enumerate(marked):
                found += self.mark * (number > 0)
                found += self._pieces(part)
            start = end
        return found

    def _pieces(self, text: str) -> list[str]:
        # by their ids: what is not known would be its text, which has none
        return [self.sp.IdToPiece(number) for number in self.sp.Encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.sp.PieceToId(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.sp.IdToPiece(index))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return str(self.sp.Decode([self.sp.PieceToId(token) for token in tokens]))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        begin = [self.bos_token_id]
        return begin + token_ids_0 + (begin + token_ids_1 if token_ids_1 else [])

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        name = f"{filename_prefix}-tokenizer.model" if filename_prefix else "tokenizer.model"
        out = Path(save_directory) / name
        if out.resolve() != Path(self.vocab_file).resolve():
            copyfile(self.vocab_file, out)
        return (str(out),)
